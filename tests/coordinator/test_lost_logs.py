"""The log of an attempt whose end nobody told says so, also where its step never starts again."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import update

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.end_unheard import UNENDED
from coordinator.actions.release_step import release_step
from coordinator.tables import Step, table_of
from shared.protocol import Order
from tests.factories import LOCAL, Held, Mill, a_step

STEPS = table_of(Step)
LOST_AFTER = 61
DELAY = 10  # before a step whose runner was lost may be taken again
HALF = b"half\n"
WHOLE = HALF + UNENDED % len(HALF)


@pytest.fixture
def later(mill: Mill) -> Mill:
    """After the time in which nobody counts as silent."""
    mill.clock.advance(100)
    return mill


def a_lost_step(mill: Mill, fields: dict[str, Any] | None = None, **request: Any) -> Held:
    """It has said `HALF`, and waits for another runner."""
    mill.a_build([a_step("test", **(fields or {}))], **request)
    held = mill.acquire(mill.a_runner())[0]
    mill.start(held)
    mill.append(held, 0, HALF)
    mill.clock.advance(LOST_AFTER)
    mill.expire()
    assert mill.step(held.step_id).state == "ready"
    assert log(mill, held) == HALF  # its runner may still come back
    return held


def again(mill: Mill) -> Held:
    mill.clock.advance(DELAY)
    return mill.acquire(mill.a_runner())[0]


def log(mill: Mill, held: Held, attempt: int = 1) -> bytes:
    return mill.site.logs.path(mill.step(held.step_id).build_id, held.step_id, attempt).read_bytes()


def cancel(mill: Mill, held: Held) -> None:
    mill.now(cancel_build, mill.site, LOCAL, mill.step(held.step_id).build_id)


def release(mill: Mill, held: Held) -> None:
    mill.now(release_step, mill.site, held.runner.caller, held.step_id, held.proof, reason="no room")


def wait_too_long(mill: Mill, _lost: Held) -> None:
    mill.clock.advance(600)
    mill.expire()


def fail_before_the_start(mill: Mill, _lost: Held) -> None:
    mill.complete(again(mill), "failed", reason="bad_config")


def fall_silent_when_told_to_stop(mill: Mill, lost: Held) -> None:
    mill.heartbeat((claimed := again(mill)).runner, claimed)
    cancel(mill, lost)
    mill.clock.advance(21)
    mill.expire()


def release_when_told_to_stop(mill: Mill, lost: Held) -> None:
    claimed = again(mill)
    cancel(mill, lost)
    release(mill, claimed)


def release_and_cancel(mill: Mill, lost: Held) -> None:
    release(mill, again(mill))
    cancel(mill, lost)


def poison(mill: Mill, lost: Held) -> None:
    spec = update(STEPS).where(STEPS.c.id == lost.step_id).values(spec={"name": 3})
    mill.tx(lambda tx: tx.connection().execute(spec))
    mill.clock.advance(DELAY)
    assert mill.acquire(mill.a_runner()) == []


End = Callable[[Mill, Held], None]
ENDS: list[tuple[End, dict[str, Any], dict[str, Any]]] = [
    (cancel, {}, {}),
    (wait_too_long, {"queueTimeoutSeconds": 300}, {}),
    (wait_too_long, {}, {"timeout_seconds": 300}),
    (fail_before_the_start, {}, {}),
    (fall_silent_when_told_to_stop, {}, {}),
    (release_when_told_to_stop, {}, {}),
    (release_and_cancel, {}, {}),
    (poison, {}, {}),
]


@pytest.mark.parametrize(("end", "fields", "request_"), ENDS)
def test_the_log_of_a_lost_attempt_says_so_where_its_step_never_starts_again(
    later: Mill, end: End, fields: dict[str, Any], request_: dict[str, Any]
) -> None:
    lost = a_lost_step(later, fields, **request_)

    end(later, lost)

    step, first = later.step(lost.step_id), later.attempts(lost.step_id)[0]
    assert later.build(step.build_id).finished_at is not None
    assert log(later, lost) == WHOLE
    assert (first.outcome, first.log_state, first.log_size) == ("lost", "gap", len(WHOLE))
    assert step.log_size == (len(WHOLE) if step.attempt == 1 else 0)


def test_what_was_lost_before_a_bare_completion_says_so_too(later: Mill, client: httpx.Client) -> None:
    lost = a_lost_step(later)

    answer = client.post(f"/api/runner/{lost.step_id}/complete", json={"status": "success", "logs": "all\n"})

    assert answer.status_code == 200, answer.text
    assert (log(later, lost), log(later, lost, 2)) == (WHOLE, b"all\n")


def test_the_log_of_a_lost_attempt_is_ended_once(later: Mill) -> None:
    lost = a_lost_step(later)
    second = again(later)
    later.start(second)
    later.append(second, 0, HALF)
    cancel(later, lost)
    later.clock.advance(21)

    later.expire()

    assert (log(later, lost), log(later, lost, 2)) == (WHOLE, WHOLE)


def test_who_comes_back_in_time_finds_its_log_as_it_was(later: Mill) -> None:
    lost = a_lost_step(later)

    orders: list[Order] = later.heartbeat(lost.runner, lost)
    later.complete(lost, log_size=len(HALF))

    assert orders[0].reason == "revived"
    assert log(later, lost) == HALF
    assert later.attempts(lost.step_id)[0].log_state == "complete"


# Attempts that ended before they began


def give_back(mill: Mill, held: Held) -> None:
    release(mill, held)


def never_speak_again(mill: Mill, _held: Held) -> None:
    mill.clock.advance(21)
    assert mill.expire() == 1


def fall_silent_after_a_heartbeat(mill: Mill, held: Held) -> None:
    mill.heartbeat(held.runner, held)
    mill.clock.advance(LOST_AFTER)
    assert mill.expire() == 1


def give_back_when_told_to_stop(mill: Mill, held: Held) -> None:
    cancel(mill, held)
    release(mill, held)


def be_forced(mill: Mill, held: Held) -> None:
    cancel(mill, held)
    mill.clock.advance(21)
    assert mill.expire() == 1


UNBEGUN = pytest.mark.parametrize(
    "end",
    [give_back, never_speak_again, fall_silent_after_a_heartbeat, give_back_when_told_to_stop, be_forced],
)


@UNBEGUN
def test_an_attempt_that_never_began_and_said_nothing_has_a_complete_log(later: Mill, end: End) -> None:
    held = later.an_acquired_step()

    end(later, held)

    (attempt,) = later.attempts(held.step_id)
    assert (attempt.log_state, attempt.log_size) == ("complete", 0)


@UNBEGUN
def test_what_an_attempt_said_before_it_began_ends_with_a_line(later: Mill, end: End) -> None:
    held = later.an_acquired_step()
    later.append(held, 0, HALF)

    end(later, held)

    (attempt,) = later.attempts(held.step_id)
    assert (attempt.log_state, attempt.log_size) == ("gap", len(WHOLE))
    assert later.step(held.step_id).log_size == len(WHOLE)
    assert log(later, held) == WHOLE


def test_a_line_before_the_beginning_is_written_once(later: Mill) -> None:
    held = later.an_acquired_step()
    later.append(held, 0, HALF)
    fall_silent_after_a_heartbeat(later, held)

    later.start(again(later))
    cancel(later, held)
    later.clock.advance(21)
    later.expire()

    assert log(later, held) == WHOLE


def test_a_claim_that_cannot_be_handed_out_has_a_complete_log(later: Mill) -> None:
    lost = a_lost_step(later)

    poison(later, lost)

    second = later.attempts(lost.step_id)[1]
    assert (second.outcome, second.log_state, second.log_size) == ("failed", "complete", 0)
