"""What the documentation and the published contract show can be run as it stands there."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from coordinator.app import ALL_ENDPOINTS
from tests.factories import Api, a_step
from tests.runner.repositories import Repository
from tests.runner.state_folder import a_state_folder
from tests.trip.stage import ROOT, Process, free_port, until

EXAMPLES = ROOT / "docs" / "api"
CONTRACT = (ROOT / "tests" / "contract" / "build-execution-api.txt").read_text()
NODE_MODULES = "/usr/share/nodejs"
UUID = "550e8400-e29b-41d4-a716-446655440000"


@dataclass(frozen=True)
class Installation:
    """What `buildmill up` has said once, and a project that can be built."""

    address: str
    email: str
    password: str
    tenant: str
    token: str
    project: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "BUILDMILL": self.address,
            "EMAIL": self.email,
            "PASSWORD": self.password,
            "PROJECT_ID": self.project,
        }

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}", "X-Tenant-ID": self.tenant}


@pytest.fixture(scope="module")
def installed() -> Iterator[Installation]:
    """`buildmill up` with its first user, and a project with a repository and a workflow."""
    with a_state_folder() as folder:
        address = f"http://127.0.0.1:{free_port()}"
        options = ["--port", address.rpartition(":")[2], "--data", str(folder / "data")]
        up = Process(folder, "up", *options, "--state", str(folder / "state"), "--executor", "process")
        try:
            found = until(lambda: re.search(r"log in at \S+ as (\S+) with password (\S+)", up.output), 60)
            tenant = until(lambda: re.search(r"X-Tenant-ID: (\S+)", up.output))
            token = until(lambda: re.search(r"token for programs: (\S+)", up.output))
            yield Installation(
                address, found[1], found[2], tenant[1], token[1], a_project(address, tenant[1], folder)
            )
        finally:
            up.close()


def a_project(address: str, tenant: str, folder: Path) -> str:
    repository = Repository(folder / "repository")
    repository.commit({"hello": "hello from the repository\n"})
    with httpx.Client(base_url=address, timeout=60) as client:
        api = Api(client)
        project = api.post("/api/projects", {"accountId": tenant, "name": "examples"})["id"]
        api.a_workflow([a_step("build", runScript="cat hello")], project)
        changed = client.patch(f"/api/projects/{project}", json={"repoUrl": repository.url})
        assert changed.status_code == 200, changed.text
    return str(project)


def run(installed: Installation, *argv: str, said: str | None = None) -> str:
    """What a program has printed that had to end well."""
    done = subprocess.run(
        argv,
        input=said,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, **installed.environment, "NODE_PATH": NODE_MODULES, "NO_PROXY": "127.0.0.1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_curl_example_runs(installed: Installation) -> None:
    said = run(installed, "bash", str(EXAMPLES / "curl-examples.sh"))

    assert said.endswith("done\n")
    assert '"message":"hello from the repository"' in said.replace('": "', '":"')
    assert "\nsuccess\n" in said


def test_the_curl_examples_leave_no_operation_out() -> None:
    script = (EXAMPLES / "curl-examples.sh").read_text()
    asked = set(re.findall(r"call ([A-Z]+) \"?(/[a-z0-9/$_A-Z-]*)", script))
    asked |= set(re.findall(r"-X ([A-Z]+) \"\$api(/[a-z/-]*)\"", script))
    asked |= {("GET", path) for path in re.findall(r"\"\$api(/builds/[$a-z/]*)\?ticket", script)}
    shown = {(method, re.sub(r"\$\w+", "{id}", path)) for method, path in asked}

    existing = {
        (one.method, one.path.removeprefix("/api/v1"))
        for one in ALL_ENDPOINTS
        if one.path.startswith("/api/v1/")
    }
    assert shown == existing


def test_the_python_example_runs(installed: Installation) -> None:
    said = run(installed, sys.executable, str(EXAMPLES / "example.py"))

    assert "Status: success" in said
    assert "hello from the repository" in said


def test_the_javascript_example_runs(installed: Installation) -> None:
    said = run(installed, "node", str(EXAMPLES / "example.js"))

    assert "[INFO] build: hello from the repository" in said
    assert said.endswith("Status: success\n")


# The contract's own examples: other address and credentials, and the tenant's header where it is forgotten


def example(installed: Installation, begin: str, end: str) -> str:
    """The part of the contract from `begin` up to the first `end` behind it, for this installation."""
    start = CONTRACT.index(begin)
    text = CONTRACT[start : CONTRACT.index(end, start)]
    for theirs, ours in (
        ("http://localhost:8080", installed.address),
        ("ws://localhost:8080", installed.address.replace("http", "ws")),
        ("your-jwt-token", installed.token),
        ("YOUR_JWT_TOKEN", installed.token),
        ("$TOKEN", installed.token),
        ("<tenant-uuid>", installed.tenant),
        ("user@imagefactory.local", installed.email),
        ("__SET_BEFORE_LOGIN__", installed.password),
        (UUID, installed.project),
    ):
        text = text.replace(theirs, ours)
    return text


def make(installed: Installation) -> str:
    answer = httpx.post(
        f"{installed.address}/api/v1/builds",
        headers=installed.headers,
        json={"project_id": installed.project, "git_branch": "main"},
    )
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def start(installed: Installation, build: str) -> None:
    answer = httpx.post(f"{installed.address}/api/v1/builds/{build}/start", headers=installed.headers)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("begin", "expected"),
    [
        ("curl -X GET http://localhost:8080/api/v1/builds \\", '"builds":'),
        ("curl -X POST http://localhost:8080/api/v1/auth/login", '"token":'),
        ("curl -X POST http://localhost:8080/api/v1/builds \\", '"status":"queued"'),
        ("curl -X POST http://localhost:8080/api/v1/builds/{id}/start", '"status":"in_progress"'),
        ("curl -X GET http://localhost:8080/api/v1/builds/{id}/status", '"total_steps":1'),
        (
            'curl -X GET "http://localhost:8080/api/v1/builds?status=failed&project_id=UUID',
            '"has_more":false',
        ),
    ],
)
def test_the_contracts_curl_examples_run(installed: Installation, begin: str, expected: str) -> None:
    build = make(installed)
    command = example(installed, begin, "\n\n").replace("{id}", build).replace("UUID", installed.project)

    said = run(installed, "bash", "-euc", command)

    assert expected in said


def test_the_contracts_python_example_runs(installed: Installation) -> None:
    program = example(installed, "import requests\n", "\nNode.js\n")
    with_tenant = program.replace(
        "'Content-Type': 'application/json'}",
        f"'Content-Type': 'application/json', 'X-Tenant-ID': '{installed.tenant}'}}",
    )
    assert with_tenant != program

    said = run(installed, sys.executable, "-", said=with_tenant)

    assert re.fullmatch(r"Created build [0-9a-f-]{36}\nStatus: queued\n", said)


def test_without_the_tenant_an_example_is_told_what_it_lacks(installed: Installation) -> None:
    answer = httpx.post(
        f"{installed.address}/api/v1/builds",
        headers={"Authorization": f"Bearer {installed.token}"},
        json={"project_id": installed.project, "git_branch": "main"},
    )

    assert answer.status_code == 400
    assert "X-Tenant-ID" in answer.json()["error"]


def with_tenant_header(installed: Installation, program: str) -> str:
    """The header that the contract's examples in JavaScript forget."""
    lines = program.replace(
        "`Bearer ${token}`,\n", f"`Bearer ${{token}}`,\n    'X-Tenant-ID': '{installed.tenant}',\n"
    ).replace("`Bearer ${token}` }", f"`Bearer ${{token}}`, 'X-Tenant-ID': '{installed.tenant}' }}")
    assert lines != program
    return lines


def test_the_contracts_node_example_runs(installed: Installation) -> None:
    program = with_tenant_header(
        installed, example(installed, "const token = 'your-jwt-token';\n\n// Create", "\ncURL\n")
    )
    whole = f"const WebSocket = require('ws');\n(async () => {{\n{program}\n}})();"
    environment = {**os.environ, "NODE_PATH": NODE_MODULES}
    with subprocess.Popen(["node", "-e", whole], stdout=subprocess.PIPE, text=True, env=environment) as node:
        assert node.stdout is not None
        created = re.search(r"Created build (\S+)", node.stdout.readline())
        assert created is not None
        start(installed, created[1])
        said, _ = node.communicate(timeout=60)

    assert node.returncode == 0
    assert "hello from the repository" in said


def test_the_contracts_websocket_example_runs(installed: Installation) -> None:
    build = make(installed)
    start(installed, build)
    program = example(
        installed, "const token = 'your-jwt-token';\nconst buildId", "\nLog Message Format\n\ninterface"
    )
    program = with_tenant_header(installed, program).replace("your-build-id", build)

    said = run(installed, "node", "-e", f"const WebSocket = require('ws');\n{program}")

    assert "[INFO] hello from the repository" in said
    assert said.endswith("Connection closed\n")
