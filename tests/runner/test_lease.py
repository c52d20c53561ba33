"""One heartbeat speaks for all attempts and hands on what it hears."""

import threading

import httpx
import pytest

from runner.client import Client
from runner.lease import Pulse
from shared.protocol import Heartbeat
from tests.runner.claims import an_attempt


class Coordinator:
    """Answers heartbeats as told, and remembers them."""

    def __init__(self):
        self.answers = []
        self.heard = []
        self.beat = threading.Semaphore(0)

    def __call__(self, request):
        self.heard.append(Heartbeat.model_validate_json(request.content))
        self.beat.release()
        answer = self.answers.pop(0) if self.answers else (200, {})
        if isinstance(answer, Exception):
            raise answer
        status, said = answer
        return httpx.Response(status, json={"attempts": [], "next": 0.5, **said})

    def wait(self, beats=1):
        for _ in range(beats):
            assert self.beat.acquire(timeout=10)


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def superseded():
    return threading.Event()


@pytest.fixture
def revoked():
    return threading.Event()


@pytest.fixture
def rotated():
    return threading.Event()


@pytest.fixture
def pulse_of(coordinator, superseded, revoked, rotated, tmp_path):
    made = []

    def make(*attempts):
        client = Client("http://coordinator.test", "secret", transport=httpx.MockTransport(coordinator))
        pulse = Pulse(
            client,
            session="session-1",
            state=tmp_path,
            attempts=lambda: attempts,
            free_slots=lambda: 3,
            is_draining=lambda: True,
            superseded=superseded.set,
            revoked=revoked.set,
            rotate=lambda: rotated.set() or True,
        )
        pulse.start()
        made.append((pulse, client))
        return pulse

    yield make
    for pulse, client in made:
        pulse.stop()
        client.close()


def an_order(action, **said):
    return (200, {"attempts": [{"stepId": "step-1", "attempt": 1, "action": action, **said}]})


def test_all_attempts_are_named_in_one_beat(coordinator, pulse_of):
    pulse = pulse_of(an_attempt("step-1"), an_attempt("step-2"))

    pulse.beat_soon()
    coordinator.wait()

    heard = coordinator.heard[0]
    assert [report.step_id for report in heard.attempts] == ["step-1", "step-2"]
    assert (heard.slots, heard.draining, heard.session) == (3, True, "session-1")
    assert heard.disk_free > 0


def test_a_cancel_and_its_reason_reach_the_attempt(coordinator, pulse_of):
    attempt = an_attempt()
    coordinator.answers = [an_order("cancel", reason="cancelled", graceS=3)]

    pulse_of(attempt).beat_soon()

    assert attempt.cancelled.wait(10)
    assert attempt.cancel_reason == "cancelled"
    assert attempt.must_stop
    assert not attempt.abandoned.is_set()


def test_an_attempt_that_counts_no_more_is_abandoned(coordinator, pulse_of):
    attempt = an_attempt()
    coordinator.answers = [an_order("abandon")]

    pulse_of(attempt).beat_soon()

    assert attempt.abandoned.wait(10)


def test_an_order_for_another_attempt_of_the_step_changes_nothing(coordinator, pulse_of):
    attempt = an_attempt(attempt=2)
    coordinator.answers = [an_order("abandon")]

    pulse = pulse_of(attempt)
    pulse.beat_soon()
    coordinator.wait(2)  # the second beat comes after the first answer was handed on

    assert not attempt.must_stop


def test_an_older_attempt_of_a_step_is_named_and_obeys_beside_the_newer_one(coordinator, pulse_of):
    older, newer = an_attempt(attempt=1), an_attempt(attempt=2)
    coordinator.answers = [an_order("abandon")]

    pulse_of(older, newer).beat_soon()
    coordinator.wait()

    assert [report.attempt for report in coordinator.heard[0].attempts] == [1, 2]
    assert older.abandoned.wait(10)
    assert not newer.must_stop


@pytest.mark.parametrize(
    "unforeseen", [OSError("the disk is away"), RuntimeError("closed"), httpx.InvalidURL("what is this")]
)
def test_it_beats_on_after_a_failure_nobody_foresaw(coordinator, pulse_of, unforeseen):
    attempt = an_attempt()
    coordinator.answers = [unforeseen, an_order("cancel")]

    pulse = pulse_of(attempt)
    pulse.beat_soon()
    coordinator.wait()
    pulse.beat_soon()

    assert attempt.cancelled.wait(10)


def test_it_beats_on_when_nobody_answers_and_kills_nothing(coordinator, pulse_of):
    attempt = an_attempt()
    coordinator.answers = [(503, {}), (401, {"code": "unauthenticated"}), an_order("continue")]

    pulse = pulse_of(attempt)
    for _ in range(3):
        pulse.beat_soon()
        coordinator.wait()
    coordinator.wait()

    assert not attempt.must_stop


def test_a_newer_process_of_the_same_runner_is_made_way_for(coordinator, pulse_of, superseded):
    coordinator.answers = [(409, {"error": "a newer process", "code": "session_superseded", "details": []})]

    pulse_of(an_attempt()).beat_soon()

    assert superseded.wait(10)


def test_a_revoked_runner_hears_it_at_the_next_beat(coordinator, pulse_of, revoked):
    coordinator.answers = [(401, {"error": "this runner was revoked", "code": "revoked", "details": []})]
    pulse = pulse_of()

    pulse.beat_soon()

    assert revoked.wait(10)


def test_who_is_merely_unknown_is_not_revoked(coordinator, pulse_of, revoked):
    unknown = {"error": "this runner is not known", "code": "unauthenticated", "details": []}
    coordinator.answers = [(401, unknown)]
    pulse = pulse_of()

    pulse.beat_soon()
    coordinator.wait(2)

    assert not revoked.is_set()


def test_the_new_secret_is_used_as_soon_as_it_is_taken(coordinator, pulse_of, rotated):
    coordinator.answers = [(200, {"rotate": True, "next": 60.0})]
    pulse = pulse_of()

    pulse.beat_soon()
    coordinator.wait(2)

    assert rotated.is_set()
