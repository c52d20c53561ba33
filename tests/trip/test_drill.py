"""`buildmill drill` at a coordinator with short timings: whole, interrupted, and at a careless one."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.store.dialect import open_database
from tests.factories import a_step
from tests.trip.stage import ROOT, Process, Stage, a_stage, free_port, until

SHORT = {"lost_after": 3.0, "claim_ttl": 1.0, "amnesty": 0.0}
THIRDS = (
    "killed-runner,wedged-step",
    "lost-runner,repeated-completion,late-completion",
    "cut-connection,full-spool",
)


@contextlib.contextmanager
def a_small_stage(**settings: float) -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="bm-db-") as folder:
        database = open_database(f"sqlite:///{folder}/buildmill.db")
        try:
            with a_stage(database, **settings) as stage:
                yield stage
        finally:
            database.dispose()


@pytest.fixture
def stage() -> Iterator[Stage]:
    with a_small_stage(**SHORT) as stage:
        yield stage


@contextlib.contextmanager
def a_careless_coordinator(address: str) -> Iterator[str]:
    """One that answers every completion as if it had been taken, whatever the real one says to it."""

    class Careless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            passed_on = {"Authorization", "Content-Type", "X-Attempt", "X-Lease"}
            headers = {name: value for name, value in self.headers.items() if name.title() in passed_on}
            answer = httpx.request(
                self.command, f"{address}{self.path}", content=body, headers=headers, timeout=60
            )
            status, said = answer.status_code, answer.content
            if self.path.endswith("/complete"):
                status, said = 200, b'{"success": true, "stepStatus": "SUCCESS", "buildComplete": false}'
            self.send_response(status)
            if status != 204:
                self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said if status != 204 else b"")

        do_POST = do_DELETE = do_GET  # noqa: N815 - the names that the server calls

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


class Drill:
    """One drill as an operator starts it, its temporary files in a folder of the test."""

    def __init__(self, folder: Path, address: str, *options: str) -> None:
        self._folder = Path(tempfile.mkdtemp(dir=folder, prefix="drill-"))
        self._folder.chmod(0o755)
        self._record = self._folder / "record.json"
        argv = [sys.executable, "-m", "coordinator", "drill", "--coordinator", address]
        argv += ["--executor", "process", "--json", str(self._record), *options]
        self._child = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, "TMPDIR": str(self._folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def interrupt(self) -> None:
        self._child.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float = 110) -> tuple[int, str]:
        """Its exit code and what it has said."""
        try:
            said, _ = self._child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self._child.terminate()
            raise
        return self._child.returncode, said.decode()

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self._record.read_text())
        return found

    @property
    def left(self) -> list[str]:
        """What it did not remove: folders, and processes that have them among their words or settings."""
        folders = [entry.name for entry in self._folder.iterdir() if entry != self._record]
        return folders + [f"process {pid}" for pid in processes_that_name(self._folder)]


def processes_that_name(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                if str(folder).encode() in words:
                    found.append(int(entry.name))
    return found


def accounts_of_drills(stage: Stage) -> set[str]:
    """Every drill there has been, by the runners that it registered."""
    found = (re.match(r"drill-[0-9a-f]+", runner["name"]) for runner in stage.api.get("/api/runners"))
    return {match[0] for match in found if match}


def projects_of(stage: Stage, accounts: set[str]) -> list[dict[str, Any]]:
    return [
        project
        for account in accounts
        for project in stage.api.get("/api/projects", params={"accountId": account})
    ]


@pytest.mark.timeout(200)
def test_every_fault_is_caused_and_every_promise_held_in_three_drills_at_a_time(stage: Stage) -> None:
    theirs = stage.submit([a_step("theirs"), a_step("labelled", labels=["gpu"])])

    drills = [Drill(stage.folder, stage.address, "--steps", "4", "--only", third) for third in THIRDS]
    ended = [drill.wait() for drill in drills]

    for (code, said), drill, third in zip(ended, drills, THIRDS, strict=True):
        assert code == 0, said
        assert "verdict: every promise held: 0 duplicates, 0 losses, 0 late recoveries" in said
        outcomes = {fault["fault"]: fault["outcome"] for fault in drill.record["faults"]}
        assert outcomes == dict.fromkeys(third.split(","), "held")
        assert drill.left == []
    accounts = accounts_of_drills(stage)
    assert len(accounts) == 3
    assert projects_of(stage, accounts) == []
    assert [image["slug"] for image in stage.api.get("/api/docker-images")] == ["box"]
    theirs = stage.api.build(theirs["id"])
    assert [(step["status"], step["attempt"]) for step in theirs["steps"]] == [("PENDING", 0)] * 2


def test_an_interrupted_drill_removes_what_it_has_made(stage: Stage) -> None:
    drill = Drill(stage.folder, stage.address, "--only", "lost-runner")
    until(lambda: len(stage.api.get("/api/runners")) == 3, 40)  # the first one has just been killed

    drill.interrupt()
    code, said = drill.wait()

    assert code == 1
    assert "interrupted: removing what the drill has made" in said
    assert drill.left == []
    assert projects_of(stage, accounts_of_drills(stage)) == []


def test_what_would_take_too_long_is_skipped_and_says_why() -> None:
    with a_small_stage(claim_ttl=600.0, lost_after=600.0) as stage:
        drill = Drill(
            stage.folder, stage.address, "--only", "late-completion,lost-runner,repeated-completion"
        )
        code, said = drill.wait()
        outcomes = {fault["fault"]: fault["outcome"] for fault in drill.record["faults"]}

    assert code == 0, said
    assert outcomes == {
        "lost-runner": "skipped",
        "repeated-completion": "held",
        "late-completion": "skipped",
    }
    assert "the coordinator gives a silent runner 600 s" in said
    assert "2 skipped" in said


def test_a_coordinator_that_takes_every_completion_is_found_out(stage: Stage) -> None:
    with a_careless_coordinator(stage.address) as address:
        code, said = Drill(stage.folder, address, "--only", "repeated-completion,late-completion").wait()

    assert code == 1
    assert "duplicate: a second, other outcome was taken" in said
    assert "duplicate: the late completion is answered with 200" in said


def test_a_coordinator_that_wants_tokens_is_tried_with_one(stage: Stage) -> None:
    port, data = free_port(), stage.folder / "tokens"
    coordinator = Process(
        stage.folder, "coordinator", "--port", str(port), "--data", str(data), "--auth", "token"
    )
    address, only = f"http://127.0.0.1:{port}", ["--only", "killed-runner", "--steps", "1"]
    token = ["--token-file", str(data / "keys" / "admin-token")]
    try:
        until(lambda: "coordinator: http" in coordinator.output, told=lambda: coordinator.output)

        refused = Drill(stage.folder, address, *only).wait()
        held = Drill(stage.folder, address, *only, *token).wait()
    finally:
        coordinator.close()

    assert (refused[0], held[0]) == (2, 0), refused[1] + held[1]
    assert "--token-file has to name a file" in refused[1]


@pytest.mark.parametrize(
    "options",
    [
        ["--coordinator", "ftp://here"],
        ["--only", "earthquake"],
        ["--steps", "0"],
        ["--token-file", "/nowhere"],
        ["--json", "/nowhere/record.json"],
    ],
)
def test_bad_usage_ends_with_two(options: list[str]) -> None:
    argv = [sys.executable, "-m", "coordinator", "drill", "--executor", "process", *options]

    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)

    assert done.returncode == 2, done.stdout + done.stderr


def test_an_unreachable_coordinator_ends_with_two_and_one_line(tmp_path: Path) -> None:
    code, said = Drill(tmp_path, f"http://127.0.0.1:{free_port()}").wait(30)

    assert code == 2
    assert "no coordinator answers at" in said
    assert "Traceback" not in said
