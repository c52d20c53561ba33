"""A new secret: what is on the disk before anybody hears of it, and what a failure leaves."""

import hashlib
import json
from contextlib import closing

import httpx
import pytest

from runner.client import Client
from runner.errors import Unauthorized, Unreachable
from runner.rotation import rotate_secret
from runner.state_dir import Identity, former_ids, load_identity, save_identity
from shared.protocol import Heartbeat
from tests.runner.test_step_run import refusal

ADDRESS = "http://coordinator.test"
IDENTITY = Identity("runner-1", "the-secret", ADDRESS)


class Coordinator:
    """Answers as told, and remembers what it was told and what the disk held then."""

    def __init__(self, state):
        self.state = state
        self.answers = []
        self.told = []
        self.shown = []
        self.on_disk = []

    def __call__(self, request):
        self.shown.append(request.headers["authorization"].removeprefix("Bearer "))
        self.on_disk.append(load_identity(self.state))
        if request.url.path.endswith("/rotate"):
            self.told.append(json.loads(request.content)["secretSha256"])
        answer = self.answers.pop(0) if self.answers else httpx.Response(200, json={"ok": True})
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def coordinator(tmp_path):
    save_identity(tmp_path, IDENTITY)
    return Coordinator(tmp_path)


@pytest.fixture
def client(coordinator):
    client = Client(ADDRESS, IDENTITY.secret, transport=httpx.MockTransport(coordinator))
    yield client
    client.close()


def digest_of(secret):
    return hashlib.sha256(secret.encode()).hexdigest()


def beat(client):
    return client.heartbeat(Heartbeat(session="the-session"))


def test_the_secret_is_on_the_disk_before_its_digest_is_told_and_alone_before_it_is_used(
    coordinator, client, tmp_path
):
    coordinator.answers = [httpx.Response(200, json={"ok": True}), httpx.Response(200, json={"attempts": []})]

    assert rotate_secret(client, tmp_path)
    beat(client)

    when_told, when_used = coordinator.on_disk
    assert when_told.secret == IDENTITY.secret
    assert coordinator.told == [digest_of(when_told.next_secret)]
    assert (when_used.secret, when_used.next_secret) == (when_told.next_secret, "")
    assert coordinator.shown == [IDENTITY.secret, when_told.next_secret]
    assert (tmp_path / "identity.json").stat().st_mode & 0o777 == 0o600
    assert former_ids(tmp_path) == ["runner-1"]


@pytest.mark.parametrize(
    "answer",
    [
        lambda: httpx.ReadError("the answer was lost"),
        lambda: httpx.Response(503),
        lambda: refusal(409, "conflict"),
        lambda: refusal(400, "invalid"),
        lambda: refusal(401, "unauthenticated"),
        lambda: httpx.Response(200, content=b"<html>a gateway</html>"),
    ],
)
def test_without_an_answer_the_present_secret_goes_on_and_the_same_is_told_again(
    coordinator, client, tmp_path, answer
):
    coordinator.answers = [answer()]

    assert not rotate_secret(client, tmp_path)
    assert load_identity(tmp_path).secret == IDENTITY.secret
    assert rotate_secret(client, tmp_path)

    assert coordinator.told[0] == coordinator.told[1]
    assert coordinator.shown == [IDENTITY.secret] * 2


def test_a_disk_that_takes_nothing_keeps_the_present_secret(coordinator, client, tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(28, "no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("runner.state_dir.write_whole", full)
        assert not rotate_secret(client, tmp_path)

    assert coordinator.told == []
    assert load_identity(tmp_path) == IDENTITY


def test_an_identity_that_has_gone_is_not_made_up(coordinator, client, tmp_path):
    (tmp_path / "identity.json").unlink()

    assert not rotate_secret(client, tmp_path)

    assert coordinator.told == []


def test_no_secret_is_shown_by_an_identity():
    assert "secret" not in repr(Identity("runner-1", "a-secret", ADDRESS, "b-secret")).replace(
        "next_secret", ""
    )


def test_what_crosses_the_change_of_secrets_is_sent_again_at_once():
    """It left with the former secret, and arrives behind the first use of the new one."""

    def cross(_request):
        client.use_secret("the-next")
        return refusal(401, "unauthenticated")

    client = Client(ADDRESS, "the-secret", transport=httpx.MockTransport(cross))
    with closing(client), pytest.raises(Unreachable) as raised:
        beat(client)

    assert not isinstance(raised.value, Unauthorized)
    assert raised.value.retry_after_s is None
