"""A canary is set as a secret, given to steps, and looked for everywhere that it has no business to be."""

import json
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runner.mask import needles_for
from tests.factories import a_step
from tests.threats.stack import Stack, containers_of
from tests.trip.stage import said_in, steps_of, until

EXECUTORS = pytest.mark.parametrize("executor", ["docker", "process"])
MOST_BYTES = 64 * 1024 * 1024


class Canary:
    """A secret of a project, and the look for it in all of its spellings."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.value = f"canary-{secrets.token_hex(12)}+'\"$x"
        self.needles = [needle for needle in needles_for(self.value.encode()) if len(needle) >= 16]
        self.project = stack.a_project()
        self.path = f"/api/projects/{self.project}/secrets"
        assert stack.http.put(f"{self.path}/CANARY", json={"value": self.value}).status_code == 201

    def is_in(self, text: bytes) -> bool:
        return any(needle in text for needle in self.needles)

    def files_with_it(self, folder: Path) -> list[str]:
        found = []
        for path in sorted(folder.rglob("*")):
            try:
                is_plain = path.is_file() and not path.is_symlink() and path.stat().st_size < MOST_BYTES
                if is_plain and self.is_in(path.read_bytes()):
                    found.append(str(path.relative_to(folder)))
            except FileNotFoundError:
                continue  # it has just been removed
        return found

    def processes_with_it(self) -> list[str]:
        lines = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    lines.append((folder / "cmdline").read_bytes())
                except OSError:
                    continue  # it has just ended
        return [repr(line) for line in lines if self.is_in(line)]

    def answers_with_it(self, build_id: str) -> list[str]:
        """Everything that can be asked about the build and its project."""
        build = self.stack.api.build(build_id)
        steps = [step["id"] for step in build["steps"]]
        asked = [
            f"/api/builds/{build_id}", f"/api/builds/{build_id}/artifacts", self.path, "/openapi.json",
            f"/api/projects/{self.project}", f"/api/projects/{self.project}/workflows",
            f"/api/projects/{self.project}/workflows/{build['workflowId']}", "/api/runners",
            f"/api/projects/{self.project}/builds", "/api/audit-logs?limit=1000",
            *(f"/api/steps/{step}/log" for step in steps),
            *(f"/api/runner/{step}" for step in steps),
        ]  # fmt: skip
        return [path for path in asked if self.is_in(self.stack.http.get(path).content)]


@pytest.fixture
def canary(stack: Stack) -> Iterator[Canary]:
    yield Canary(stack)


def shown_by_the_engine(step_id: str) -> bytes:
    (container,) = containers_of(step_id)
    shown = b""
    for command in (["inspect", container], ["logs", container], ["top", container]):
        asked = subprocess.run(["docker", *command], capture_output=True, check=False, timeout=60)
        shown += asked.stdout + asked.stderr
    return shown


@EXECUTORS
@pytest.mark.threat("G08")
def test_a_secret_is_nowhere_but_in_the_step(stack: Stack, canary: Canary, executor: str) -> None:
    script = (
        'echo "begun with ${#CANARY}"; n=0\n'
        "while [ $n -lt 40 ]; do n=$((n+1)); sleep 0.1; done\n"  # meanwhile it is looked for
        'echo "$CANARY"; printf %s "$CANARY" | base64; env | grep CANARY; mkdir out; mkfifo "out/$CANARY"\n'
        'printf %s "$CANARY" | od -An -v -tx1 | tr -d " \\n"; echo; echo "no such file: $CANARY" >&2'
    )
    step = a_step("one", runScript=script, labels=[executor], secrets=["CANARY"], outputPaths=["out"])
    build = stack.submit([step], project_id=canary.project)
    step_id = steps_of(build)["one"]["id"]
    stack.await_log(step_id, f"\nbegun with {len(canary.value)}\n".encode())

    if executor == "docker":
        shown = shown_by_the_engine(step_id)
        assert not canary.is_in(shown), shown.decode(errors="replace")
    assert canary.processes_with_it() == []
    assert canary.files_with_it(stack.folder) == []
    assert canary.answers_with_it(build["id"]) == []

    build = stack.await_end(build["id"])
    assert build["status"] == "SUCCESS", stack.tell(build["id"])
    said = said_in(stack.log(step_id))
    assert said.splitlines()[1:] == [b"***", b"***", b"CANARY=***", b"***", b"no such file: ***"], said
    assert b"out/***" in stack.log(step_id)
    assert canary.answers_with_it(build["id"]) == []
    # the runner keeps the raw log until the attempt has been removed
    until(
        lambda: canary.files_with_it(stack.folder) == [], 30, told=lambda: canary.files_with_it(stack.folder)
    )
    assert not [name for name, program in stack.programs.items() if canary.is_in(program.output.encode())]


@pytest.mark.threat("G01")
@pytest.mark.threat("G02")
@EXECUTORS
def test_a_secret_that_comes_byte_by_byte_or_line_by_line_is_masked(
    stack: Stack, canary: Canary, executor: str
) -> None:
    lines = [secrets.token_hex(30) for _ in range(4)]
    key = "\n".join(["-----BEGIN KEY-----", *lines, "-----END KEY-----"])
    assert stack.http.put(f"{canary.path}/KEY", json={"value": key}).status_code == 201
    script = (
        "rest=$CANARY\n"
        'while [ -n "$rest" ]; do printf %s "${rest%"${rest#?}"}"; rest=${rest#?}; sleep 0.01; done\n'
        'echo; echo "$KEY" | while read -r line; do echo "  $line"; sleep 0.05; done; echo "$CANARY$CANARY"'
    )

    build = stack.run(
        [a_step("one", runScript=script, labels=[executor], secrets=["CANARY", "KEY"])],
        project_id=canary.project,
    )

    log = stack.log(steps_of(build)["one"]["id"])
    assert said_in(log).splitlines()[0] == b"***"
    assert said_in(log).splitlines()[-1] == b"***"
    assert not canary.is_in(log)
    assert not [line for line in lines if line.encode() in log]


@pytest.mark.threat("G09")
def test_a_fork_with_the_name_of_the_default_branch_is_given_nothing(stack: Stack, canary: Canary) -> None:
    ours, fork = stack.a_repository(), stack.a_repository()
    for repository in (ours, fork):
        repository.commit({"a.txt": "a"})
    changes = {"repoUrl": ours.url, "defaultBranch": "main"}
    assert stack.http.patch(f"/api/projects/{canary.project}", json=changes).status_code == 200
    steps = [a_step("one", runScript="env", labels=["process"], secrets=["CANARY"])]

    def run(**request: Any) -> dict[str, Any]:
        build = stack.run(steps, project_id=canary.project, **request)
        told: dict[str, Any] = steps_of(build)["one"]
        return told

    refused, given = run(repoUrl=fork.url, branch="main"), run(repoUrl=ours.url, branch="main")

    assert (refused["status"], refused["reason"], refused["logSize"]) == ("FAILED", "bad_config", 0)
    assert given["status"] == "SUCCESS"
    assert b"\nCANARY=***\n" in stack.log(given["id"])


@pytest.mark.threat("G08")
def test_refusals_tell_nothing_of_what_was_sent(stack: Stack, canary: Canary) -> None:
    value = canary.value
    for name, body in (
        ("lower", {"value": value}),
        ("A", {"value": value + "\0"}),
        ("A", {"value": value * 4000}),
        ("A", {"value": {"deep": [value]}}),
        ("A", {"value": value, "more": value}),
    ):
        answer = stack.http.put(f"{canary.path}/{name}", json=body)
        assert answer.status_code in (400, 413)
        assert not canary.is_in(answer.content), answer.text
    broken = json.dumps({"value": value}).encode()[:-2]
    answer = stack.http.put(f"{canary.path}/A", content=broken, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert not canary.is_in(answer.content)
    assert not canary.is_in(stack.coordinator.output.encode())
