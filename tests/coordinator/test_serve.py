"""What an operator reads when the coordinator cannot start: one line with the cause and the remedy."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from coordinator.actions.create_project import create_project
from coordinator.actions.set_secret import set_secret
from coordinator.app import create_app
from coordinator.cli.main import main
from coordinator.cli.serve import address_of, listening
from coordinator.rules.access import Audience, Caller
from coordinator.settings import Settings
from shared.clock import utc_now


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def buildmill(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


@pytest.mark.parametrize("command", ["coordinator", "up"])
def test_a_taken_port_is_said_in_one_line_before_anything_is_made(
    command: str, taken_port: int, tmp_path: Path
) -> None:
    answer = buildmill(command, "--data", str(tmp_path), "--port", str(taken_port))

    assert answer.exit_code == 1
    assert answer.output == (
        f"Error: cannot listen on 127.0.0.1, port {taken_port}: "
        "the port is taken; stop what listens there or name another --port\n"
    )
    assert not (tmp_path / "buildmill.db").exists()


def test_an_address_of_another_machine_is_refused_with_the_remedy(tmp_path: Path) -> None:
    answer = buildmill("coordinator", "--data", str(tmp_path), "--host", "203.0.113.7", "--auth", "token")

    assert answer.exit_code == 1
    assert answer.output.count("\n") == 1
    assert "this machine does not have that address" in answer.output


def test_open_access_does_not_listen_beyond_loopback(tmp_path: Path) -> None:
    answer = buildmill("coordinator", "--data", str(tmp_path), "--host", "0.0.0.0")

    assert answer.exit_code == 1
    assert "use --auth token" in answer.output


def test_port_0_takes_a_free_port_and_names_it(tmp_path: Path) -> None:
    with listening(Settings(data=tmp_path, port=0)) as door:
        port = door.getsockname()[1]

        assert port != 0
        assert address_of(door) == f"http://127.0.0.1:{port}"


def test_an_ipv6_address_stands_in_brackets(tmp_path: Path) -> None:
    with listening(Settings(data=tmp_path, host="::1", port=0)) as door:
        assert address_of(door) == f"http://[::1]:{door.getsockname()[1]}"


@pytest.mark.parametrize(
    ("database", "said"),
    [
        ("nonsense", "this is no database URL"),
        ("mysql://user:hidden@host/name", "mysql is not supported"),
        ("postgresql://user:hidden@127.0.0.1:1/name", "the database does not answer"),
    ],
)
def test_an_unusable_database_is_one_line_without_its_password(
    database: str, said: str, tmp_path: Path
) -> None:
    answer = buildmill("migrate", "--data", str(tmp_path), "--database", database)

    assert answer.exit_code == 1
    assert answer.output.startswith(f"Error: {said}")
    assert answer.output.count("\n") == 1
    assert "hidden" not in answer.output


def test_a_file_that_is_no_database_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "buildmill.db").write_text("something else\n" * 100)

    answer = buildmill("migrate", "--data", str(tmp_path))

    assert answer.exit_code == 1
    assert answer.output == "Error: the database does not answer: file is not a database\n"


def test_a_data_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    answer = buildmill("coordinator", "--data", str(tmp_path / "file"))

    assert answer.exit_code == 1
    assert answer.output == f"Error: cannot make the data folder {tmp_path / 'file'}: File exists\n"


def test_the_lack_of_the_key_of_stored_secrets_is_one_line_at_the_start(tmp_path: Path) -> None:
    app = create_app(Settings(data=tmp_path))
    lanes, site = app.state.coordinator.lanes, app.state.coordinator.site
    caller, now = Caller("local", Audience.USER), utc_now()
    project, _ = lanes.write_and_wait(lambda tx: create_project(tx, caller, account="a", name="p", now=now))
    lanes.write_and_wait(
        lambda tx: set_secret(tx, site, caller, project.id, name="TOKEN", value="a value", now=now)
    )
    lanes.close()
    (tmp_path / "keys" / "secrets-key").unlink()

    answer = buildmill("coordinator", "--data", str(tmp_path), "--port", "0")

    assert answer.exit_code == 1
    assert answer.output.count("\n") == 1
    assert "secrets-key is missing" in answer.output


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("http://127.0.0.1:1", 1, "Error: no coordinator answers at http://127.0.0.1:1"),
        ("nonsense", 2, "must begin with http:// or https://"),
    ],
)
def test_watching_nothing_ends_at_once(address: str, code: int, said: str) -> None:
    answer = buildmill("watch", "--coordinator", address, "0")

    assert answer.exit_code == code
    assert said in answer.output
