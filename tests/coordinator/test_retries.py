"""A step runs again by itself where it may, as often as it says, and not before its time."""

from typing import Any

import pytest

from coordinator.actions.release_step import release_step
from coordinator.rules.retries import retry_delay
from coordinator.store.steps import STEPS
from tests.factories import Held, MadeRunner, Mill, a_step

NEW_KEYS = ("graceSeconds", "noOutputSeconds", "pullTimeoutSeconds", "queueTimeoutSeconds", "retry")


@pytest.fixture
def later(mill: Mill) -> Mill:
    """After the time in which nobody counts as silent."""
    mill.clock.advance(100)
    return mill


def a_retried(**retry: Any) -> list[dict[str, Any]]:
    return [a_step("test", retry=retry)]


def fail(mill: Mill, held: Held, exit_code: int = 1, **said: Any) -> str:
    return str(mill.complete(held, "failed", exit_code=exit_code, **said).state)


def again(mill: Mill, runner: MadeRunner, *, after: float) -> Held:
    """The step's next attempt, which nobody can have any earlier."""
    mill.clock.advance(after - 0.1)
    assert mill.acquire(runner) == []
    mill.clock.advance(0.1)
    (held,) = mill.acquire(runner)
    mill.start(held)
    return held


def test_a_failed_script_is_not_tried_again_unless_its_step_says_so(mill: Mill) -> None:
    held = mill.a_running_step()

    assert fail(mill, held) == "failed"
    assert mill.step(held.step_id).user_retries == 0


def test_a_failed_script_is_tried_as_often_as_its_step_says_with_longer_and_longer_pauses(mill: Mill) -> None:
    held = mill.a_running_step(a_retried(max=2))

    assert fail(mill, held) == "ready"
    held = again(mill, held.runner, after=10)
    assert fail(mill, held) == "ready"
    held = again(mill, held.runner, after=20)
    assert fail(mill, held) == "failed"

    step = mill.step(held.step_id)
    assert (step.attempt, step.user_retries, step.infra_retries) == (3, 2, 0)
    assert (step.reason, step.exit_code) == ("exit_nonzero", 1)
    assert [row.outcome for row in mill.attempts(held.step_id)] == ["failed"] * 3
    assert mill.build(step.build_id).state == "failed"


def test_a_step_that_succeeds_when_tried_again_lets_its_build_succeed(mill: Mill) -> None:
    held = mill.a_running_step(a_retried(max=1))
    fail(mill, held)

    mill.complete(again(mill, held.runner, after=10))

    step = mill.step(held.step_id)
    assert (step.state, step.reason) == ("succeeded", None)
    assert mill.build(step.build_id).state == "succeeded"


@pytest.mark.parametrize(("exit_code", "state"), [(75, "ready"), (1, "failed"), (255, "ready")])
def test_only_the_exit_codes_that_are_named_are_tried_again(mill: Mill, exit_code: int, state: str) -> None:
    held = mill.a_running_step(a_retried(max=1, exitCodes=[75, 255]))

    assert fail(mill, held, exit_code) == state


@pytest.mark.parametrize("reason", ["timeout", "oom", "output_missing", "no_output", "cancelled"])
def test_no_other_failure_of_the_step_is_tried_again(mill: Mill, reason: str) -> None:
    held = mill.a_running_step(a_retried(max=3))

    assert fail(mill, held, reason=reason) in ("failed", "cancelled")


def test_a_step_that_must_not_run_twice_is_never_tried_again(mill: Mill) -> None:
    spec = [a_step("deploy", retry={"max": 3, "infra": 2}, exclusive=True)]

    assert fail(mill, mill.a_running_step(spec)) == "failed"
    assert fail(mill, mill.a_running_step(spec), reason="daemon_error") == "failed"


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_what_the_machine_broke_is_tried_as_often_as_the_step_allows(mill: Mill, allowed: int) -> None:
    held = mill.a_running_step(a_retried(infra=allowed))

    for retry in range(allowed):
        assert fail(mill, held, reason="daemon_error") == "ready"
        held = again(mill, held.runner, after=10 * 2**retry)
    assert fail(mill, held, reason="daemon_error") == "failed"

    assert mill.step(held.step_id).infra_retries == allowed


def test_a_lost_runner_uses_up_the_retries_of_the_machine_not_those_of_the_step(later: Mill) -> None:
    held = later.a_running_step(a_retried(max=1, infra=1))

    later.clock.advance(61)
    assert later.expire() == 1
    held = again(later, later.a_runner(), after=10)
    assert fail(later, held) == "ready"

    step = later.step(held.step_id)
    assert (step.infra_retries, step.user_retries) == (1, 1)


def test_a_step_that_allows_no_retry_is_lost_with_its_runner(later: Mill) -> None:
    held = later.a_running_step(a_retried(infra=0))

    later.clock.advance(61)
    later.expire()

    step = later.step(held.step_id)
    assert (step.state, step.reason) == ("failed", "runner_lost")


def test_a_runner_that_comes_back_gives_the_retry_back(later: Mill) -> None:
    held = later.a_running_step()
    later.clock.advance(61)
    later.expire()
    assert later.step(held.step_id).infra_retries == 1

    later.heartbeat(held.runner, held)

    step = later.step(held.step_id)
    assert (step.state, step.infra_retries, step.reason) == ("running", 0, None)


def test_a_late_completion_of_a_lost_attempt_gives_the_retry_back(later: Mill) -> None:
    held = later.a_running_step()
    later.clock.advance(61)
    later.expire()

    assert later.complete(held).state == "succeeded"

    assert later.step(held.step_id).infra_retries == 0


def test_a_claim_that_is_given_back_or_never_acknowledged_uses_up_no_retry(mill: Mill) -> None:
    held = mill.an_acquired_step(a_retried(max=1, infra=1))
    mill.now(release_step, mill.site, held.runner.caller, held.step_id, held.proof, reason="")
    (held,) = mill.acquire(held.runner)
    mill.clock.advance(21)
    assert mill.expire() == 1

    step = mill.step(held.step_id)

    assert (step.state, step.infra_retries, step.user_retries) == ("ready", 0, 0)


def test_a_step_that_an_earlier_version_wrote_down_has_the_defaults(mill: Mill) -> None:
    held = mill.a_running_step()

    spec = {key: value for key, value in mill.step(held.step_id).spec.items() if key not in NEW_KEYS}
    mill.tx(
        lambda tx: tx.connection().execute(STEPS.update().where(STEPS.c.id == held.step_id).values(spec=spec))
    )

    assert mill.start(held).grace_s == 10
    assert fail(mill, held, reason="daemon_error") == "ready"
    held = again(mill, held.runner, after=10)
    assert held.claim.limits.pull_timeout_s == 1800
    assert fail(mill, held) == "failed"


def test_pauses_grow_up_to_five_minutes() -> None:
    assert [retry_delay(retries).total_seconds() for retries in range(7)] == [10, 20, 40, 80, 160, 300, 300]
