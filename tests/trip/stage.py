"""A coordinator that listens on loopback, runners that work for it, and what a user asks of the two."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from coordinator.api.server import make_server
from coordinator.app import create_app
from coordinator.settings import Settings as CoordinatorSettings
from coordinator.store.dialect import Database, open_database
from runner.agent import Agent
from runner.cli import make_agent
from runner.client import Client
from runner.settings import Settings as RunnerSettings
from runner.state_dir import StateLock
from tests.factories import Api
from tests.runner.repositories import Repository
from tests.runner.state_folder import a_state_folder
from tests.trip.faults import Gate, Wire

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
PROTOCOLS = "https,http,ssh,file"
OVER = ("SUCCESS", "FAILED")
FAST = {"heartbeat": 0.5, "git_protocols": PROTOCOLS}


def until(look: Callable[[], T], timeout_s: float = 30, *, told: Callable[[], object] = lambda: "") -> T:
    """Look from outside, as a user does, until there is something to be seen."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if seen:
            return seen
        assert time.monotonic() < deadline, f"not seen within {timeout_s} s: {told()}"
        time.sleep(0.02)


class RunnerThread:
    """A runner in this process, its network in the test's hands."""

    def __init__(
        self, address: str, state: Path, *, wire: Wire | None = None, once: bool = False, **settings: Any
    ) -> None:
        self.state = state
        self.wire = wire or Wire()
        self._lock, self._locked = StateLock(state), True
        chosen = {
            "executor": "process",
            "slots": 2,
            "git_protocols": PROTOCOLS,
            "disk_reserve_mb": 0,
            **settings,
        }
        self.agent: Agent = make_agent(
            RunnerSettings(coordinator=address, state=state, **chosen),
            once=once,
            connect=partial(Client, transport=self.wire),
        )
        self._thread = threading.Thread(target=self.agent.run, name="runner", daemon=True)
        self._thread.start()

    def join(self, timeout_s: float = 60) -> None:
        """Wait for its end; harmless twice."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the runner does not end"
        if self._locked:
            self._lock.release()
            self._locked = False
            self.wire.close()

    def close(self) -> None:
        self.wire.is_unplugged = False
        self.agent.drain()
        self._thread.join(2)
        if self._thread.is_alive():
            self.agent.shut_down()
        self.join()


class Process:
    """One of our programs as a process of its own, its output in a file."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        env: dict[str, str] | None = None,
        module: str = "coordinator",
    ) -> None:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=f"{Path(arguments[0]).name}-", suffix=".out")
        self._output = Path(name)
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env={**os.environ, "BUILDMILL_GIT_PROTOCOLS": PROTOCOLS, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
            )
        finally:
            os.close(descriptor)

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self._child.poll() is None

    def send(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        """As a loss of power does it: nothing is said, nothing is finished."""
        self._child.kill()
        self._child.wait(30)

    def wait(self, timeout_s: float = 60) -> int:
        return self._child.wait(timeout_s)

    def close(self) -> None:
        if self.is_alive:
            self._child.terminate()
            try:
                self._child.wait(1)
            except subprocess.TimeoutExpired:
                self._child.terminate()  # the second time it does not wait for its steps
            try:
                self._child.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()


class User:
    """What somebody does with a coordinator at an address."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._http = httpx.Client(base_url=address, timeout=60)
        self.api = Api(self._http)
        self._names = itertools.count(1)

    def close(self) -> None:
        self._http.close()

    def is_answered(self) -> bool:
        """Whether the coordinator is there and ready."""
        try:
            return self._http.get("/readyz").is_success
        except httpx.TransportError:
            return False

    def a_project(self) -> str:
        return str(self.api.a_project(f"account-{next(self._names)}")["id"])

    def an_image(self, slug: str, image: str) -> None:
        self.api.an_image(slug, image)

    def submit(
        self, spec: Sequence[dict[str, Any]], *, project_id: str | None = None, **request: Any
    ) -> dict[str, Any]:
        """A fresh workflow and a build of it; the build as it can be read back."""
        workflow = self.api.a_workflow(list(spec), project_id or self.a_project())
        return self.build_again(workflow, **request)

    def build_again(self, workflow: dict[str, Any], **request: Any) -> dict[str, Any]:
        body = {"workflowId": workflow["id"], **request}
        made = self.api.post(f"/api/projects/{workflow['projectId']}/builds", body)
        return self.api.build(made["id"])

    def run(self, spec: Sequence[dict[str, Any]], *, timeout_s: float = 60, **request: Any) -> dict[str, Any]:
        """Submit a build and wait for its end."""
        return self.await_end(self.submit(spec, **request)["id"], timeout_s)

    def await_end(self, build_id: str, timeout_s: float = 60) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            build = self.api.build(build_id)
            return build if build["status"] in OVER else None

        return until(ended, timeout_s, told=lambda: self.tell(build_id))

    def await_step(self, build_id: str, name: str, status: str, timeout_s: float = 30) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            step = steps_of(self.api.build(build_id))[name]
            return step if step["status"] == status else None

        return until(there, timeout_s, told=lambda: self.tell(build_id))

    def await_log(self, step_id: str, text: bytes, timeout_s: float = 30) -> bytes:
        def there() -> bytes | None:
            log = self.log(step_id)
            return log if text in log else None

        return until(there, timeout_s, told=lambda: self.log(step_id)[-2000:])

    def log(self, step_id: str, attempt: int | None = None) -> bytes:
        query = f"?attempt={attempt}" if attempt else ""
        answer = self._http.get(f"/api/steps/{step_id}/log{query}")
        assert answer.status_code in (200, 404), answer.text
        return answer.content if answer.status_code == 200 else b""

    def cancel(self, build_id: str) -> None:
        answer = self._http.post(f"/api/builds/{build_id}/cancel")
        assert answer.is_success, answer.text

    def artifacts(self, build_id: str) -> dict[str, dict[str, Any]]:
        return {found["path"]: found for found in self.api.get(f"/api/builds/{build_id}/artifacts")}

    def transitions(self, step_id: str) -> list[str]:
        """What the trail tells of a step, oldest first."""
        page = self.api.get("/api/audit-logs", params={"limit": 1000})
        return [
            record["action"]
            for record in reversed(page["auditLogs"])
            if (record.get("details") or {}).get("stepId") == step_id
        ]

    def tell(self, build_id: str) -> str:
        """All that helps to understand why a build is not what a test expects."""
        build = self.api.build(build_id)
        lines = [f"build {build['status']} {build.get('statusReason')}"]
        for step in build["steps"]:
            lines.append(f"--- {step['name']} {step['status']} {step.get('reason')} x{step['attempt']}")
            lines.append(self.log(step["id"])[-3000:].decode(errors="replace"))
        return "\n".join(lines)


class Stage(User):
    """A coordinator in this process behind a gate, and folders for runners and repositories."""

    def __init__(self, database: Database, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self._numbers = itertools.count(1)
        self._runners: list[RunnerThread | Process] = []
        app = create_app(CoordinatorSettings(data=folder / "data", **{**FAST, **settings}), database=database)
        self._lanes = app.state.coordinator.lanes
        self.gate = Gate(app)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = make_server(self.gate, host="127.0.0.1", port=0, fd=self._listener.fileno())
        self._thread = threading.Thread(target=self._server.run, name="coordinator", daemon=True)
        self._thread.start()
        super().__init__(f"http://127.0.0.1:{self._listener.getsockname()[1]}")

    def a_runner(self, machine: str = "r", **settings: Any) -> RunnerThread:
        """A runner at work. The same machine is the same folder, so the same runner."""
        made = RunnerThread(self.address, self.folder / machine, **{"name": machine, **settings})
        self._runners.append(made)
        return made

    def a_runner_process(self, *options: str, machine: str = "r", executor: str = "process") -> Process:
        made = Process(
            self.folder,
            "runner",
            "--coordinator",
            self.address,
            "--state",
            str(self.folder / machine),
            "--executor",
            executor,
            *options,
        )
        self._runners.append(made)
        return made

    def a_runner_with_many_lives(
        self, deaths: Path, *more: str, machine: str = "r", executor: str = "process"
    ) -> Process:
        """It dies where the names of its steps say so, see `lives`."""
        options = [
            "--coordinator",
            self.address,
            "--state",
            str(self.folder / machine),
            "--executor",
            executor,
        ]
        made = Process(self.folder, str(deaths), "runner", *options, *more, module="tests.trip.lives")
        self._runners.append(made)
        return made

    def a_repository(self) -> Repository:
        return Repository(self.folder / f"repository-{next(self._numbers)}")

    def close(self) -> None:
        self.gate.open()
        for runner in self._runners:
            runner.close()
        super().close()
        self._server.should_exit = True
        self._server.force_exit = True  # polls that nobody waits for any more
        self._thread.join(30)
        self._lanes.close()
        self._listener.close()


@contextmanager
def a_stage(database: Database, **settings: Any) -> Iterator[Stage]:
    with a_state_folder() as folder:
        stage = Stage(database, folder, **settings)
        try:
            yield stage
        finally:
            stage.close()


@contextmanager
def an_engine_stage(**settings: Any) -> Iterator[Stage]:
    """A stage on SQLite whose images are the ones that scripts/images makes."""
    with tempfile.TemporaryDirectory(prefix="bm-db-") as folder:
        database = open_database(f"sqlite:///{folder}/buildmill.db")
        try:
            with a_stage(database, **settings) as stage:
                stage.an_image("box", "buildmill/busybox:1")
                stage.an_image("py", "buildmill/python:3")
                yield stage
        finally:
            database.dispose()


def steps_of(build: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in build["steps"]}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


_SAID = re.compile(
    rb"##\[buildmill:start [0-9a-f]+ [^\n]*\]\n\+ [^\n]*\n(.*)##\[buildmill:end [0-9a-f]+ ", re.DOTALL
)


def said_in(log: bytes) -> bytes:
    """What the script itself wrote, without the lines around it."""
    found = _SAID.search(log)
    assert found, log[-2000:]
    return found[1]
