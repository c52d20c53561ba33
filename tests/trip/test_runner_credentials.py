"""What a runner does whose secret is renewed or taken back, at whatever moment that happens."""

import os
import signal
import sys
import traceback
from pathlib import Path

import httpx
import pytest

from runner.client import Client
from runner.durable import sync_folder, write_whole
from runner.rotation import rotate_secret
from runner.state_dir import load_identity
from shared.protocol import Heartbeat
from tests.factories import ON_SQLITE, a_step
from tests.trip.faults import Wire
from tests.trip.stage import said_in, until

WATCHED = {
    function.__code__
    for function in (rotate_secret, write_whole, sync_folder, Client.rotate, Client._send, Client.use_secret)
}
MOST_LINES = 400


def beat(client: Client):
    return client.heartbeat(Heartbeat(session="the-session"))


class Runner:
    """A runner's folder and nothing that runs: each life in it is as short as one rotation."""

    def __init__(self, stage):
        self.stage = stage
        self.state = stage.folder / "r"
        stage.a_runner("r", once=True).join()
        self.id = load_identity(self.state).runner_id

    @property
    def secret(self):
        return load_identity(self.state).secret

    def ask(self):
        self.stage.api.post(f"/api/runners/{self.id}/rotate", status=200)

    def is_known_by(self, secret):
        answer = self.stage.api.client.post(
            "/api/runner/heartbeat",
            json={"session": "the-session"},
            headers={"Authorization": f"Bearer {secret}"},
        )
        return answer.status_code == 200

    def live(self):
        """A whole life: what the heartbeat asks for is done, and the new secret is used."""
        client = Client(self.stage.address, self.secret, transport=httpx.HTTPTransport(verify=False))
        if beat(client).rotate:
            assert rotate_secret(client, self.state)
            assert not beat(client).rotate
        client.close()

    def live_until_line(self, number):
        """A life that is killed before the line of this number; False when it had no such line."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                sys.settrace(Killer(number))
                self.live()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        assert os.WIFSIGNALED(ended) or os.WEXITSTATUS(ended) == 0
        return os.WIFSIGNALED(ended)


class Killer:
    """Counts the lines of a rotation, and of the request behind it, and kills before the one of a number."""

    def __init__(self, number):
        self.left = number
        self.has_begun = False

    def __call__(self, frame, _event, _argument):
        self.has_begun = self.has_begun or frame.f_code is rotate_secret.__code__
        return self.line if self.has_begun and frame.f_code in WATCHED else None

    def line(self, _frame, event, _argument):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line


@ON_SQLITE
def test_a_runner_that_is_killed_at_any_line_of_a_rotation_is_not_locked_out(stage):
    killed = Runner(stage)
    for number in range(1, MOST_LINES):
        killed.ask()
        before = killed.secret
        died = killed.live_until_line(number)
        between = killed.secret

        killed.live()

        assert killed.is_known_by(killed.secret), number
        if killed.secret != before:
            assert not killed.is_known_by(before), number
        assert between in (before, killed.secret), number
        if not died:
            assert number > 50, "the lines were not watched"
            return
    pytest.fail("a rotation has no end")


def rotate(stage, state):
    """Ask the runner of this folder for a new secret, and wait until it uses one."""
    before = load_identity(state)
    stage.api.post(f"/api/runners/{before.runner_id}/rotate", status=200)
    until(lambda: "rotateRequestedAt" not in stage.api.get("/api/runners")[0])
    assert load_identity(state).secret != before.secret


def test_an_answer_that_is_lost_or_heard_twice_locks_nobody_out(stage):
    wire = Wire()
    working = stage.a_runner("w", wire=wire)
    for faults, verb, times in (
        (wire.lose_answers, "rotate", 2),
        (wire.repeat, "rotate", 1),
        (wire.lose_answers, "heartbeat", 2),
    ):
        faults[verb] = times

        rotate(stage, working.state)

        assert faults[verb] == 0
        assert stage.run([a_step("after")])["status"] == "SUCCESS"


def test_steps_and_their_logs_do_not_notice_that_the_secret_changes(stage):
    working = stage.a_runner("w")
    lines = "for n in $(seq 1 60); do echo line $n; sleep 0.05; done"
    build = stage.submit([a_step(name, runScript=lines) for name in ("one", "two")])
    stage.await_step(build["id"], "one", "RUNNING")

    for _ in range(3):
        rotate(stage, working.state)

    ended = stage.await_end(build["id"])
    assert ended["status"] == "SUCCESS"
    for step in ended["steps"]:
        assert step["attempt"] == 1
        assert said_in(stage.log(step["id"])) == b"".join(b"line %d\n" % n for n in range(1, 61))


@pytest.mark.threat("I11")
def test_a_runner_that_is_revoked_in_the_middle_of_a_step_kills_it_and_ends_and_another_goes_on(stage):
    pid = stage.folder / "pid"
    script = f'test "$BUILDMILL_ATTEMPT" = 2 || {{ echo $$ > {pid}; sleep 600; }}; echo done'
    build = stage.submit([a_step("a", runScript=script)])
    revoked = stage.a_runner_process("--name", "revoked")
    stage.await_step(build["id"], "a", "RUNNING")
    until(lambda: pid.exists() and pid.read_text().strip())
    (shown,) = stage.api.get("/api/runners")
    identity = load_identity(stage.folder / "r")

    assert stage.api.client.delete(f"/api/runners/{shown['id']}").status_code == 204

    assert revoked.wait(30) == 1
    assert "has revoked this runner" in revoked.output
    assert "Traceback" not in revoked.output
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()
    assert list((stage.folder / "r" / "a").glob("*/*")) == []
    for path in ("heartbeat", "acquire", "resume", "bye", f"{build['steps'][0]['id']}/complete"):
        answer = httpx.post(
            f"{stage.address}/api/runner/{path}",
            json={},
            headers={"Authorization": f"Bearer {identity.secret}", "X-Attempt": "1", "X-Lease": "x"},
        )
        assert (answer.status_code, answer.json()["code"]) == (401, "revoked"), path
    stage.a_runner("other")
    ended = stage.await_end(build["id"])
    assert (ended["status"], ended["steps"][0]["attempt"]) == ("SUCCESS", 2)
    assert ended["steps"][0]["attempts"][0]["reason"] == "runner_lost"


@ON_SQLITE
def test_a_revoked_runner_that_is_started_again_ends_with_the_remedy_and_registers_nothing(stage):
    once = stage.a_runner("r", once=True)
    once.join()
    (shown,) = stage.api.get("/api/runners")
    stage.api.client.delete(f"/api/runners/{shown['id']}")

    again = stage.a_runner_process()

    assert again.wait(30) == 1
    assert "has revoked this runner" in again.output and "identity.json" in again.output
    assert "Traceback" not in again.output
    assert stage.api.get("/api/runners") == []


@ON_SQLITE
def test_a_revoked_runner_that_was_killed_gives_up_what_it_held_when_it_comes_back(stage):
    build = stage.submit([a_step("a", runScript="sleep 600")])
    killed = stage.a_runner_process()
    stage.await_step(build["id"], "a", "RUNNING")
    killed.kill()
    (shown,) = stage.api.get("/api/runners")
    stage.api.client.delete(f"/api/runners/{shown['id']}")

    again = stage.a_runner_process()

    assert again.wait(30) == 1
    assert "has revoked this runner" in again.output
    assert list((stage.folder / "r" / "a").glob("*/*")) == []
