"""An operator administers tenants, users and tokens, whether or not a coordinator runs."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from coordinator.cli.main import main

PASSWORD = "correct horse battery staple"
START_S = 60


def buildmill(data: Path, *words: str, said: str = "") -> Result:
    return CliRunner().invoke(main, [*words, "--data", str(data)], input=said)


def well(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def running(tmp_path: Path) -> Iterator[str]:
    """The address of a coordinator that wants tokens, with its data in `tmp_path`."""
    argv = [sys.executable, "-m", "coordinator", "coordinator", "--port", "0", "--auth", "token"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*argv, "--data", str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        assert found is not None
        address = found.group()
        ends = time.monotonic() + START_S
        while True:
            try:
                assert httpx.get(f"{address}/healthz", trust_env=False).status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < ends
                time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def make_somebody(data: Path) -> str:
    """A tenant, its owner and a token of it; the token."""
    well(buildmill(data, "tenant", "create", "acme"))
    words = ("user", "create", "ann@acme.test", "--tenant", "acme", "--role", "owner", "--password-stdin")
    assert "ann@acme.test is owner of acme" in well(buildmill(data, *words, said=f"{PASSWORD}\n"))
    made = well(buildmill(data, "token", "create", "nightly", "--tenant", "acme", "--role", "viewer"))
    return made.strip()


def test_accounts_are_made_while_a_coordinator_runs(running: str, tmp_path: Path) -> None:
    token = make_somebody(tmp_path)

    login = httpx.post(
        f"{running}/api/v1/auth/login",
        json={"email": "ann@acme.test", "password": PASSWORD},
        trust_env=False,
    )
    me = httpx.get(f"{running}/api/v1/auth/me", headers={"Authorization": f"Bearer {token}"}, trust_env=False)
    assert login.json()["tenants"][0]["name"] == "acme"
    assert "build:read" in me.json()["tenants"][0]["permissions"]
    assert "build:create" not in me.json()["tenants"][0]["permissions"]
    assert "owner      ann@acme.test" in well(buildmill(tmp_path, "tenant", "members", "acme"))


def test_accounts_are_made_where_no_coordinator_runs(tmp_path: Path) -> None:
    make_somebody(tmp_path)

    assert "ann@acme.test" in well(buildmill(tmp_path, "user", "list"))
    assert "acme" in well(buildmill(tmp_path, "tenant", "list"))
    assert "nightly" in well(buildmill(tmp_path, "token", "list", "--tenant", "acme"))
    token_id = well(buildmill(tmp_path, "token", "list", "--tenant", "acme")).split()[0]
    well(buildmill(tmp_path, "token", "revoke", token_id))
    assert well(buildmill(tmp_path, "token", "list", "--tenant", "acme")) == ""


def test_what_is_refused_is_said_in_one_line(tmp_path: Path) -> None:
    make_somebody(tmp_path)

    refused = {
        ("tenant", "create", "acme"): "a tenant with this account already exists",
        ("tenant", "remove", "acme", "ann@acme.test"): "this is the last owner of the tenant",
        ("tenant", "members", "nobody"): "there is no tenant nobody",
        ("user", "disable", "bob@acme.test"): "there is no user bob@acme.test",
        ("user", "create", "no address"): "email: must be an e-mail address in plain ASCII",
        (
            "token",
            "create",
            "x",
            "--tenant",
            "acme",
            "--permission",
            "fly",
        ): "permissions[0]: is no",
        ("token", "create", "x", "--tenant", "acme"): "name either --permission or --role",
    }
    for words, why in refused.items():
        answer = buildmill(tmp_path, *words)
        assert answer.exit_code != 0, words
        assert why in answer.output, words
        assert "Traceback" not in answer.output


def test_a_made_up_password_is_shown_once(tmp_path: Path) -> None:
    made = well(buildmill(tmp_path, "user", "create", "bob@acme.test"))

    assert re.search(r"password \(shown this once\): \S{20,}", made)
    assert "password" not in well(buildmill(tmp_path, "user", "list"))


def test_no_data_folder_is_no_installation(tmp_path: Path) -> None:
    answer = buildmill(tmp_path / "none", "tenant", "list")

    assert answer.exit_code == 1
    assert "there is no data folder" in answer.output
    assert not (tmp_path / "none").exists()


def test_a_folder_of_something_else_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()

    answer = buildmill(tmp_path, "tenant", "list")

    assert answer.exit_code == 1
    assert f"{tmp_path} is not the data folder of a coordinator" in answer.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_coordinator_with_its_database_elsewhere_gets_no_other_one(tmp_path: Path) -> None:
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    data = tmp_path / "data"
    data.mkdir()
    well(buildmill(data, "tenant", "create", "acme", "--database", elsewhere))

    answer = buildmill(data, "tenant", "create", "beta")

    assert answer.exit_code == 1
    assert "name the coordinator's with --database" in answer.output
    assert not (data / "buildmill.db").exists()
    assert "acme" in well(buildmill(data, "tenant", "list", "--database", elsewhere))


@pytest.mark.parametrize("content", ["wörd".encode(), b"\xff\xfe\x00", b"", b"one\ntwo"])
def test_a_file_that_holds_no_token_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    there = ("--coordinator", "http://127.0.0.1:1", "--token-file", str(file))

    for words in (("tenant", "list"), ("watch", "a-build")):
        result = CliRunner().invoke(main, [*words, *there])
        assert (result.exit_code, result.output) == (1, f"Error: {file} holds no token\n")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"no address", b"http://[", b"http://\x01"])
def test_an_address_that_is_none_is_that_of_no_coordinator(tmp_path: Path, content: bytes) -> None:
    well(buildmill(tmp_path, "tenant", "create", "acme"))
    (tmp_path / "address").write_bytes(content)

    assert "acme" in well(buildmill(tmp_path, "tenant", "list"))


@pytest.mark.parametrize(
    "words",
    [
        ("token", "revoke", "a\x01b"),
        ("token", "revoke", "../users"),
        ("runners", "revoke", "\n"),
        ("runners", "rotate", "a/b?c"),
        ("tenant", "create", "\udcff"),
        ("tenant", "members", "\udcff"),
        ("user", "create", "\udcff@acme.test"),
    ],
)
def test_whatever_is_typed_is_refused_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    well(buildmill(tmp_path, "tenant", "create", "acme"))

    result = buildmill(tmp_path, *words)

    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code > 0, result.output.splitlines()[-1][:7]) == (True, "Error: ")


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (("tenant", "create", "acme"), b"<html>"),
        (("watch", "a-build"), b"<html>"),
        (("watch", "a-build"), b"[]"),
        (("watch", "a-build"), b"{}"),
    ],
)
def test_another_server_is_taken_for_no_coordinator(
    tmp_path: Path, words: tuple[str, ...], body: bytes
) -> None:
    class Another(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - so the library calls it

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "token").write_text("a-token")
    with ThreadingHTTPServer(("127.0.0.1", 0), Another) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = ("--coordinator", f"http://127.0.0.1:{server.server_port}")
        result = CliRunner().invoke(main, [*words, *where, "--token-file", str(tmp_path / "token")])
        server.shutdown()

    assert result.exit_code == 1
    assert (
        result.output == f"Error: what answers at http://127.0.0.1:{server.server_port} is no coordinator\n"
    )


def test_what_a_killed_coordinator_has_left_gets_no_token(tmp_path: Path) -> None:
    make_somebody(tmp_path)
    asked: list[str] = []

    class Another(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Another) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "address").write_text(f"http://127.0.0.1:{server.server_port}\n")
        shown = well(buildmill(tmp_path, "tenant", "list"))
        server.shutdown()

    assert "acme" in shown
    assert asked == []
