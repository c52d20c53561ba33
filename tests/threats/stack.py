"""The whole of Buildmill as real processes, and the look at what an attack must not have left behind."""

import contextlib
import itertools
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from tests.factories import a_step
from tests.runner.repositories import Repository
from tests.runner.state_folder import a_state_folder
from tests.trip.stage import Process, User, free_port, until

BUSYBOX = "buildmill/busybox:1"
PYTHON = "buildmill/python:3"
LOG_LIMIT = 4 * 1024 * 1024
HEADER_DEADLINE_S = 2
BODY_DEADLINE_S = 5
MARKS = ("Traceback (most recent call last)", "sqlite3.", "sqlalchemy.", 'File "/')


class Program(Process):
    """One of our programs, with its weight."""

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def resident_bytes(self) -> int:
        return self._memory("VmRSS")

    @property
    def peak_bytes(self) -> int:
        """The most that was resident since `forget_peak`."""
        return self._memory("VmHWM")

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _memory(self, field: str) -> int:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Stack(User):
    """A coordinator, a runner with containers and one without, each a process of its own.

    Every answer that passes through here is looked at: no failure of ours, no trace, no secret.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self._repositories = itertools.count(1)
        self._secrets: list[str] = []
        self.runners: dict[str, Program] = {}
        settings = {
            "BUILDMILL_HEARTBEAT": "0.5",
            "BUILDMILL_LOG_LIMIT": str(LOG_LIMIT),
            "BUILDMILL_HEADER_DEADLINE": str(HEADER_DEADLINE_S),
            "BUILDMILL_BODY_DEADLINE": str(BODY_DEADLINE_S),
        }
        at = ("--data", str(folder / "data"), "--port", str(self.port))
        self.coordinator = Program(folder, "coordinator", *at, env=settings)
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.http.event_hooks = {"response": [self.look_at]}
        self._seen: dict[str, int] = {}

    @property
    def http(self) -> httpx.Client:
        return self.api.client

    @property
    def programs(self) -> dict[str, Program]:
        return {"coordinator": self.coordinator, **self.runners}

    def _start_runner(self, executor: str, *, slots: int) -> None:
        self.runners[executor] = Program(
            self.folder,
            "runner",
            *("--coordinator", self.address, "--state", str(self.folder / executor), "--name", executor),
            *("--executor", executor, "--labels", executor, "--slots", str(slots)),
        )

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return self.http.get("/healthz").status_code == 200
        return False

    def begin(self) -> None:
        until(self._answers, 60, told=lambda: self.coordinator.output)
        self._start_runner("docker", slots=3)
        self._start_runner("process", slots=2)
        for name, image in (("box", BUSYBOX), ("python", PYTHON)):
            self.an_image(name, image)
        identities = [self.folder / name / "identity.json" for name in self.runners]
        until(lambda: all(path.exists() for path in identities), 60, told=self._tell)
        kept = [*(self.folder / "data" / "keys").iterdir()]
        self._secrets = [path.read_bytes().decode("latin-1").strip() for path in kept]
        self._secrets += [json.loads(path.read_text())["secret"] for path in identities]

    def _tell(self) -> str:
        return "\n".join(program.output[-2000:] for program in self.programs.values())

    # What an attack must not have done

    def look_at(self, answer: httpx.Response) -> None:
        """Every answer: no failure of ours, no trace, no secret."""
        answer.read()
        told = answer.content.decode("latin-1")
        assert answer.status_code < 500, told
        assert not any(mark in told for mark in MARKS), told
        assert not any(secret in told for secret in self._secrets), "a secret was told"

    def assert_unharmed(self) -> None:
        """Everybody lives and answers, nobody met the unexpected, and no payload ran on this machine."""
        assert self.http.get("/healthz", timeout=5).status_code == 200
        for name, program in self.programs.items():
            assert program.is_alive, program.output[-3000:]
            said = program.output
            fresh, self._seen[name] = said[self._seen.get(name, 0) :], len(said)
            assert "Traceback" not in fresh, fresh[-3000:]
            assert "unexpected" not in fresh, fresh[-3000:]
        left = [*Path("/tmp").glob("PWN*")]
        for path in left:
            path.unlink()  # the next test has its own payloads
        assert not left, f"a payload ran: {left}"

    # What tests ask for

    def refused(self, answer: httpx.Response, status: int = 400, path: str | None = None) -> dict[str, Any]:
        """A refusal in the contract's form, about the field at `path`."""
        assert answer.status_code == status, (answer.status_code, answer.text[:500])
        told: dict[str, Any] = answer.json()
        assert set(told) <= {"error", "code", "details", "size", "limit"}, told
        assert told["error"] and told["code"], told
        if path is not None:
            assert path in [fault["path"] for fault in told["details"]], (path, told)
        return told

    def a_repository(self) -> Repository:
        return Repository(self.folder / f"repository-{next(self._repositories)}")

    def post_workflow(self, *steps: Any, project_id: str | None = None, name: Any = "w") -> httpx.Response:
        project_id = project_id or self.a_project()
        return self.http.post(
            f"/api/projects/{project_id}/workflows", json={"name": name, "steps": list(steps)}
        )

    def run_step(self, script: str, *, on: str = "docker", **fields: Any) -> tuple[dict[str, Any], bytes]:
        """One step through everything there is: how it ended, and its log."""
        timeout_s = fields.pop("wait_s", 60)
        build_fields = fields.pop("build", {})
        step = a_step("test", runScript=script, labels=[on], **fields)
        build = self.run([step], timeout_s=timeout_s, **build_fields)
        ended: dict[str, Any] = build["steps"][0]
        return {**ended, "buildId": build["id"]}, self.log(ended["id"])

    def download(self, artifact: dict[str, Any]) -> bytes:
        answer = self.http.get(f"/api/artifacts/{artifact['id']}")
        assert answer.status_code == 200
        return answer.content

    def close(self) -> None:
        for runner in self.runners.values():
            runner.close()
        super().close()
        self.coordinator.close()


def raw(stack: Stack, *parts: bytes) -> bytes:
    """What a socket gets back that says exactly this."""
    with socket.create_connection(("127.0.0.1", stack.port), timeout=30) as line:
        for part in parts:
            line.sendall(part)
        answer = bytearray()
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                answer += part
    return bytes(answer)


def containers_of(step_id: str) -> list[str]:
    """What the engine still has of a step."""
    asked = ["docker", "ps", "-aq", "--filter", f"label=buildmill.step={step_id}"]
    return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=60).stdout.split()


def a_stack() -> Iterator[Stack]:
    with a_state_folder() as folder:
        stack = Stack(folder)
        try:
            stack.begin()
            yield stack
        finally:
            stack.close()
