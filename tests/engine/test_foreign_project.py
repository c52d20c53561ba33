"""A real project that this team did not write: its tests run, its wheel is built, installed and used.

Its source comes from the package index when the test runs. In the containers there is no network.
"""

import http.server
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import tomllib
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.factories import a_step
from tests.runner.repositories import Repository
from tests.trip.stage import an_engine_stage, said_in, steps_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

PROJECT = "click"
RELEASE = version(PROJECT)
# pip runs out of its own wheel: making an environment for it would take longer than all the rest.
PIP = "PYTHONPATH=$(echo $PWD/vendor/pip-*.whl) PIP_DISABLE_PIP_VERSION_CHECK=1 python -m pip"
INSTALL = f"{PIP} install -q --no-index --find-links vendor --target /tmp/site"


def from_the_index(folder: Path, *wishes: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--dest", str(folder), *wishes],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    if done.returncode:
        pytest.fail(
            f"the package index cannot be reached or lacks {' '.join(wishes)}; "
            f"this test needs it for a project to build: {done.stderr.strip()[-500:]}"
        )


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The project as it was published, with the tools of its build beside it in `vendor`."""
    folder = tmp_path_factory.mktemp("foreign")
    from_the_index(folder, f"--no-binary={PROJECT}", "--no-deps", f"{PROJECT}=={RELEASE}")
    (archive,) = folder.glob(f"{PROJECT}-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    unpacked = folder / archive.name.removesuffix(".tar.gz")
    said = tomllib.loads((unpacked / "pyproject.toml").read_text())
    from_the_index(unpacked / "vendor", "pip", "pytest", *said["build-system"]["requires"])
    return unpacked


@pytest.fixture(scope="module")
def stage():
    with an_engine_stage() as stage:
        stage.a_runner(executor="docker", slots=2)
        yield stage


@pytest.fixture(scope="module")
def repository(stage, source) -> Repository:
    repository = stage.a_repository()
    shutil.copytree(source, repository.path, dirs_exist_ok=True)
    repository.git("add", "-f", ".")
    repository.commit({}, f"{PROJECT} {RELEASE} as published")
    return repository


def a_python_step(name, behind=(), **fields):
    return a_step(name, behind, imageSlug="py", network="none", **fields)


# The image has no pager, so the tests that need one stay out.
THE_WORKFLOW = [
    a_python_step("compile", runScript="python -m compileall -q src tests"),
    a_python_step(
        "wheel",
        runScript=f"{PIP} wheel -q --no-index --find-links vendor --no-deps -w dist .",
        outputPaths=["dist/*.whl"],
        cacheDirs=["/root/.cache/pip"],
    ),
    a_python_step(
        "test",
        ["wheel"],
        runScript=f"{INSTALL} pytest dist/*.whl; rm -r src; export PYTHONPATH=/tmp/site; "
        "python -m pytest -q -p no:cacheprovider -k 'not pager' --junitxml=report.xml tests",
        outputPaths=["report.xml"],
    ),
    a_python_step(
        "use",
        ["compile", "test"],
        runScript=f"ls dist report.xml; rm -r src; {INSTALL} dist/*.whl; cd /; export PYTHONPATH=/tmp/site; "
        "python -c 'import click, importlib.metadata as m; print(m.version(\"click\"), click.__file__)'",
    ),
]


def test_a_project_from_the_index_is_tested_built_and_used(stage, repository):
    build = stage.run(THE_WORKFLOW, repoUrl=repository.url, branch="main", timeout_s=240)

    steps = steps_of(build)
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert build["commitHash"] == repository.git("rev-parse", "HEAD")
    wheel = f"{PROJECT}-{RELEASE}-py3-none-any.whl"
    artifacts = stage.artifacts(build["id"])
    assert set(artifacts) == {f"dist/{wheel}", "report.xml"}
    used = said_in(stage.log(steps["use"]["id"])).decode()
    assert used.splitlines()[:3] == ["report.xml", "", "dist:"]
    assert wheel in used
    assert used.splitlines()[-1].startswith(f"{RELEASE} /tmp/site/click/")
    assert b" passed" in stage.log(steps["test"]["id"])


def test_the_same_project_is_fetched_over_http(stage, repository):
    with over_http(repository.path) as (url, asked):
        build = stage.run(
            [a_python_step("compile", runScript="python -m compileall -q src && git log --format=%s")],
            repoUrl=url,
            branch="main",
        )

    (step,) = build["steps"]
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert build["commitHash"] == repository.git("rev-parse", "HEAD")
    assert said_in(stage.log(step["id"])) == f"{PROJECT} {RELEASE} as published\n".encode()
    assert any(path.endswith("/git-upload-pack") for path in asked)


@contextmanager
def over_http(path: Path):
    """The repository behind git's own HTTP service on loopback; its address and what was asked."""
    asked: list[str] = []

    class Backend(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, body: bytes) -> None:
            place, _, query = self.path.partition("?")
            asked.append(place)
            done = subprocess.run(
                ["git", "http-backend"],
                input=body,
                capture_output=True,
                check=True,
                timeout=60,
                env={
                    "PATH": os.environ["PATH"],
                    "GIT_PROJECT_ROOT": str(path.parent),
                    "GIT_HTTP_EXPORT_ALL": "1",
                    "GIT_PROTOCOL": self.headers.get("Git-Protocol", ""),
                    "REQUEST_METHOD": self.command,
                    "PATH_INFO": place,
                    "QUERY_STRING": query,
                    "CONTENT_TYPE": self.headers.get("Content-Type", ""),
                    "CONTENT_LENGTH": str(len(body)),
                    "HTTP_CONTENT_ENCODING": self.headers.get("Content-Encoding", ""),
                    "REMOTE_ADDR": "127.0.0.1",
                },
            )
            head, _, content = done.stdout.partition(b"\r\n\r\n")
            fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n"))
            self.send_response(int(fields.pop("Status", "200").split()[0]))
            for name, value in fields.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Backend)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/{path.name}/.git", asked
    finally:
        server.shutdown()
        server.server_close()
