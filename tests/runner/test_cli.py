"""What an operator reads when a runner cannot start: one line with the cause and the remedy."""

import threading
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner, Result

from runner.cli import live, make_agent, runner
from runner.client import Client
from runner.control import Control
from runner.errors import BadSetup
from runner.journal import Journal, JournalPhase, attempt_dir
from runner.settings import Settings
from runner.state_dir import Identity, StateLock, load_identity, save_identity
from tests.runner.claims import a_claim


def run(*words: str) -> Result:
    return CliRunner().invoke(runner, list(words))


def coordinator_that_answers(status: int, body: dict[str, object]) -> httpx.MockTransport:
    return httpx.MockTransport(lambda _request: httpx.Response(status, json=body))


def test_a_coordinator_that_is_not_there_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    answer = run("--coordinator", "http://127.0.0.1:1", "--state", str(tmp_path), "--executor", "process")

    assert answer.exit_code == 1
    assert answer.output.count("\n") == 1
    assert "the coordinator at http://127.0.0.1:1 cannot be reached" in answer.output
    assert "--coordinator" in answer.output


def test_the_folder_is_free_before_nobody_is_heard_in_it_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    class Door(Control):
        def close(self) -> None:
            StateLock(tmp_path).release()
            ended.append("free")
            super().close()

    monkeypatch.setattr("runner.cli.Control", Door)

    answer = run("--coordinator", "http://127.0.0.1:1", "--state", str(tmp_path), "--executor", "process")

    assert "cannot be reached" in answer.output
    assert ended == ["free"]


def test_a_runner_that_cannot_be_heard_does_not_keep_the_folder(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()

    answer = run("--coordinator", "http://127.0.0.1:1", "--state", str(tmp_path), "--executor", "process")

    assert "no socket can be made" in answer.output
    StateLock(tmp_path).release()


def test_an_address_without_a_scheme_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    answer = run("--coordinator", "127.0.0.1:3000", "--state", str(tmp_path / "state"))

    assert answer.exit_code == 2
    assert "must begin with http:// or https://" in answer.output
    assert not (tmp_path / "state").exists()


def test_a_state_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    answer = run("--state", str(tmp_path / "file"))

    assert answer.exit_code == 1
    assert answer.output == f"Error: the state folder {tmp_path / 'file'} cannot be used: File exists\n"


def test_a_refused_token_names_the_file_that_holds_the_right_one(tmp_path: Path) -> None:
    refusing = coordinator_that_answers(
        401, {"error": "this token is not known", "code": "unauthenticated", "details": []}
    )

    with pytest.raises(BadSetup, match="keys/registration-token"):
        make_agent(
            Settings(state=tmp_path, executor="process"),
            connect=lambda address, secret: Client(address, secret, transport=refusing),
        )


@pytest.mark.parametrize(
    ("status", "code", "details", "told"),
    [
        (404, "not_found", [], "without a path of its API"),
        (400, "invalid", [{"path": "labels[0]", "reason": "is no label"}], r"\(labels\[0\]: is no label\)"),
    ],
)
def test_a_registration_that_is_refused_says_what_to_correct(
    tmp_path: Path, status: int, code: str, details: list[object], told: str
) -> None:
    refusing = coordinator_that_answers(status, {"error": "no", "code": code, "details": details})

    with pytest.raises(BadSetup, match=told):
        make_agent(
            Settings(state=tmp_path, executor="process"),
            connect=lambda address, secret: Client(address, secret, transport=refusing),
        )


def test_an_engine_that_is_not_there_is_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_identity(tmp_path, Identity("runner-1", "secret-1", "http://127.0.0.1:1"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")

    answer = run("--coordinator", "http://127.0.0.1:1", "--state", str(tmp_path))

    assert answer.exit_code == 1
    assert "Error: no container engine answers at unix://" in answer.output
    assert "--executor process" in answer.output


def test_another_coordinator_than_the_one_it_registered_with_is_pointed_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o755)
    save_identity(tmp_path, Identity("runner-1", "secret-1", "http://127.0.0.1:1"))
    said = f"remove {tmp_path / 'identity.json'} to register there"
    for parent in (tmp_path.parent, tmp_path.parent.parent):
        parent.chmod(0o755)  # git runs as another user, who has to get in

    agent = make_agent(Settings(state=tmp_path, executor="process", coordinator="http://127.0.0.1:2"))
    agent.drain()
    agent.run()

    assert said in capsys.readouterr().out


def test_a_stop_before_the_coordinator_has_answered_ends_the_runner_quietly(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    save_identity(tmp_path, Identity("runner-1", "secret-1", "http://127.0.0.1:1"))
    asked = threading.Event()

    def away(_request: httpx.Request) -> httpx.Response:
        asked.set()
        raise httpx.ConnectError("nobody is there")

    agent = make_agent(
        Settings(state=tmp_path, executor="process", coordinator="http://127.0.0.1:1"),
        connect=lambda address, secret: Client(address, secret, transport=httpx.MockTransport(away)),
    )
    life = threading.Thread(target=agent.run)
    life.start()
    assert asked.wait(10)
    agent.drain()
    life.join(10)

    assert not life.is_alive()


def test_a_runner_that_was_forgotten_begins_anew_under_another_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.client.UNWELCOME_RETRY_S", 0.1)
    monkeypatch.setattr("runner.agent.FORGOTTEN_S", 0.3)
    monkeypatch.setattr("runner.cli.obey_signals", lambda _current: None)
    for folder in (tmp_path, tmp_path.parent, tmp_path.parent.parent):
        folder.chmod(0o755)
    save_identity(tmp_path, Identity("old", "old-secret", "http://127.0.0.1:1"))
    journal = Journal.create(attempt_dir(tmp_path, "step-1", 1), a_claim().model_dump(mode="json"))
    journal.advance(JournalPhase.CLEANING)

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/runners":
            return httpx.Response(201, json={"runnerId": "new", "runnerSecret": "new-secret"})
        if "new-secret" not in request.headers["authorization"]:
            said = {"error": "this runner is not known", "code": "unauthenticated", "details": []}
            return httpx.Response(401, json=said)
        return httpx.Response(204 if request.url.path.endswith("acquire") else 200, json={"attempts": []})

    settings = Settings(state=tmp_path, executor="process", coordinator="http://127.0.0.1:1")
    with closing(Control(tmp_path)) as control:
        assert live(
            settings,
            control,
            once=True,
            connect=lambda address, secret: Client(address, secret, transport=httpx.MockTransport(answer)),
        )

    identity = load_identity(tmp_path)
    assert identity is not None and identity.runner_id == "new"
