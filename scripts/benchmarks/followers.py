"""How soon a line of a log reaches everybody who follows the build, while some of them have stopped taking.

The coordinator is a process of its own. The followers are sockets of this one, each opened by a WebSocket
handshake; a quarter of them is never read from again. First so much is written that those get stuck, then
single lines are: the time of a line runs from the moment before it is sent to the coordinator to the moment
at which the last follower has it. The memory is the largest that the coordinator needed from the moment at
which all of them had come, against what it had then.
"""

import asyncio
import base64
import os
import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from scripts.benchmarks.builds import BuildServer, a_step
from scripts.benchmarks.figure import Figure, Goal, percentile, say
from scripts.benchmarks.servers import Coordinator, a_coordinator, temporary_folder
from shared import paths
from shared.protocol import Acquire, Claims, Start

WAIT_S = 60.0
LINE_BYTES = 4096
PAUSE_S = 0.1
SOON = Goal(1.0, "<= 1 s")
FLAT = Goal(64.0, "<= 64 MiB")
_START = Start(container="none").model_dump(mode="json", by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class Size:
    followers: int = 200
    stopped: int = 50
    lines: int = 50
    megabytes: int = 8


QUICK = Size(lines=20)
SMALLEST = Size(followers=20, stopped=5, lines=3, megabytes=1)


@dataclass(frozen=True)
class Seen:
    """Of each line, how long it took to reach everybody; and by how much the coordinator grew."""

    seconds: list[float]
    grown_mib: float


def measure(size: Size) -> list[Figure]:
    seen = follow(size)
    live = size.followers - size.stopped
    worst, median = max(seen.seconds), percentile(seen.seconds, 0.5)
    what = f"{size.followers} followers of a build, {size.stopped} of them stopped"
    return [
        Figure(
            f"{what}: a line reaches the other {live}",
            f"p50 {median * 1000:.0f} ms, all within {worst * 1000:.0f} ms",
            "",
            SOON.text,
            SOON.is_met_by(worst),
        ),
        Figure(
            f"{what}: {size.megabytes} MB are written, memory of the coordinator",
            f"+{seen.grown_mib:.0f} MiB",
            "",
            FLAT.text,
            FLAT.is_met_by(seen.grown_mib),
        ),
    ]


def follow(size: Size) -> Seen:
    """Begin a coordinator and a build, let everybody follow it, and write its log."""
    with temporary_folder() as folder, a_coordinator(folder / "data") as coordinator:
        talker = _Talker(coordinator)
        try:
            return asyncio.run(_follow(coordinator, folder / "data", talker, size))
        finally:
            talker.close()


class _Talker:
    """The runner of the one step of a build, which only writes its log."""

    def __init__(self, coordinator: Coordinator) -> None:
        api = BuildServer(coordinator)
        self.build_id = api.a_build(api.a_workflow([a_step("talk")]))
        runner = {"Authorization": f"Bearer {api.a_runner_secret()}"}
        api.close()
        self._http = httpx.Client(base_url=coordinator.url, timeout=WAIT_S, trust_env=False, headers=runner)
        wish = Acquire(request_id=secrets.token_hex(8), session=secrets.token_hex(8), slots=1)
        answer = self._http.post(paths.ACQUIRE, json=wish.model_dump(mode="json", by_alias=True))
        (claim,) = Claims.model_validate_json(answer.content).claims
        self._http.headers.update({paths.ATTEMPT_HEADER: str(claim.attempt), paths.LEASE_HEADER: claim.lease})
        self._http.post(paths.START.format(step_id=claim.step_id), json=_START).raise_for_status()
        self._path = paths.LOG.format(step_id=claim.step_id)
        self._size = 0

    def say(self, text: bytes) -> None:
        answer = self._http.post(f"{self._path}?offset={self._size}", content=text)
        answer.raise_for_status()
        self._size += len(text)

    def close(self) -> None:
        self._http.close()


@dataclass
class _Follower:
    """One WebSocket, read by hand: a library's would cost more than what is measured."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    seen: dict[bytes, float] = field(default_factory=dict)

    async def read(self, mark: bytes) -> None:
        """Note when each line that begins with the mark has come."""
        while True:
            text = await self._next_frame()
            at = text.find(b'"message": "' + mark)
            if at >= 0:
                line = text[at + 12 : text.index(b'"', at + 12)]
                self.seen[line] = time.monotonic()

    async def _next_frame(self) -> bytes:
        size = (await self.reader.readexactly(2))[1]
        if size >= 126:
            size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
        return await self.reader.readexactly(size)


async def _follow(coordinator: Coordinator, data: Path, talker: _Talker, size: Size) -> Seen:
    headers = _headers_of_operator(coordinator, data)
    path = f"/api/v1/builds/{talker.build_id}/logs/stream"
    everybody = [await _open(coordinator, path, headers) for _ in range(size.followers)]
    live = everybody[size.stopped :]
    mark = secrets.token_hex(8).encode()
    readers = [asyncio.create_task(one.read(mark)) for one in live]
    try:
        await _write(talker, [mark + b"-begin"], live)
        before = _resident_mib(coordinator.pid, "VmRSS")
        Path(f"/proc/{coordinator.pid}/clear_refs").write_text("5")
        text = (b"x" * (LINE_BYTES - 1) + b"\n") * (64 * 1024 // LINE_BYTES)
        for _ in range(size.megabytes * 16):
            await asyncio.to_thread(talker.say, text)
        await _write(talker, [mark + b"-written"], live)
        say(f"followers: {size.megabytes} MB are written")
        seconds = await _write(talker, [mark + b"-%d" % number for number in range(size.lines)], live)
        grown = _resident_mib(coordinator.pid, "VmHWM") - before
    finally:
        for task in readers:
            task.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
        for one in everybody:
            one.writer.transport.abort()
    return Seen(seconds, grown)


async def _write(talker: _Talker, lines: list[bytes], live: list[_Follower]) -> list[float]:
    """Write one line after the other; how long each took to reach the last follower."""
    sent: dict[bytes, float] = {}
    for line in lines:
        sent[line] = time.monotonic()
        await asyncio.to_thread(talker.say, line + b"\n")
        await asyncio.sleep(PAUSE_S)
    async with asyncio.timeout(WAIT_S):
        while not all(line in one.seen for one in live for line in lines):
            await asyncio.sleep(0.01)
    return [max(one.seen[line] for one in live) - sent[line] for line in lines]


async def _open(coordinator: Coordinator, path: str, headers: dict[str, str]) -> _Follower:
    reader, writer = await asyncio.open_connection(coordinator.host, coordinator.port)
    lines = {
        "Host": f"{coordinator.host}:{coordinator.port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": base64.b64encode(os.urandom(16)).decode(),
        **headers,
    }
    told = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"GET {path} HTTP/1.1\r\n{told}\r\n".encode())
    async with asyncio.timeout(WAIT_S):
        answer = await reader.readuntil(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 101 "):
        raise RuntimeError(f"a follower was refused: {answer[:200]!r}")
    return _Follower(reader, writer)


def _headers_of_operator(coordinator: Coordinator, data: Path) -> dict[str, str]:
    token = (data / "keys" / "admin-token").read_text().strip()
    login = {"Authorization": f"Bearer {token}"}
    tenants = httpx.get(f"{coordinator.url}/api/tenants", headers=login, timeout=WAIT_S, trust_env=False)
    (tenant,) = [one["id"] for one in tenants.raise_for_status().json() if one["accountId"] == "bench"]
    return {**login, "X-Tenant-ID": tenant}


def _resident_mib(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))
