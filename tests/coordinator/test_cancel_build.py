"""A build that is to stop stops, wherever its steps stand."""

import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.release_step import release_step
from coordinator.actions.say_bye import say_bye
from coordinator.errors import Conflict, NotFound, StaleAttempt
from shared.protocol import Action
from tests.factories import LOCAL, Held, MadeBuild, Mill, a_spec, a_step, together


def cancel(mill: Mill, build_id: str) -> str:
    return mill.now(cancel_build, mill.site, LOCAL, build_id).cancel_id or ""


def build_of(held: Held, mill: Mill) -> str:
    return str(mill.step(held.step_id).build_id)


def test_a_build_that_waits_is_cancelled_at_once(mill: Mill) -> None:
    build = mill.a_build(a_spec(one=[], two=["one"]))

    cancel(mill, build.id)

    assert mill.states(build) == {"one": "cancelled", "two": "cancelled"}
    assert mill.build(build.id).state == "cancelled"
    assert mill.build(build.id).reason == "cancelled"
    assert mill.acquire(mill.a_runner()) == []


def test_what_runs_is_told_and_the_build_ends_with_it(mill: Mill) -> None:
    build = mill.a_build(a_spec(runs=[], waits=["runs"]))
    held = mill.acquire(mill.a_runner())[0]
    mill.start(held)

    cancel(mill, build.id)

    assert mill.states(build) == {"runs": "running", "waits": "cancelled"}
    assert mill.build(build.id).state == "cancelling"
    assert mill.heartbeat(held.runner, held)[0].action is Action.CANCEL
    mill.complete(held, "failed", reason="cancelled", exit_code=143)
    assert mill.states(build)["runs"] == "cancelled"
    assert mill.step(held.step_id).exit_code == 143
    assert mill.build(build.id).state == "cancelled"


@pytest.mark.parametrize(
    ("status", "said"), [("success", {}), ("failed", {"exit_code": 1}), ("failed", {"reason": "internal"})]
)
def test_cancel_wins_over_every_completion(mill: Mill, status: str, said: dict[str, object]) -> None:
    held = mill.a_running_step()
    build_id = build_of(held, mill)
    cancel(mill, build_id)

    verdict = mill.complete(held, status, **said)

    assert verdict.state == "cancelled"
    assert verdict.is_build_complete
    assert mill.build(build_id).state == "cancelled"


def test_a_claim_that_was_not_started_may_not_start(mill: Mill) -> None:
    held = mill.an_acquired_step()
    cancel(mill, build_of(held, mill))

    assert mill.start(held).action == "cancel"
    assert mill.step(held.step_id).state == "claimed"


def test_a_claim_that_is_released_after_the_cancel_ends_cancelled(mill: Mill) -> None:
    held = mill.an_acquired_step()
    build_id = build_of(held, mill)
    cancel(mill, build_id)

    mill.now(release_step, mill.site, held.runner.caller, held.step_id, held.proof, reason="")

    assert mill.step(held.step_id).state == "cancelled"
    assert mill.build(build_id).state == "cancelled"


def test_a_claim_whose_runner_never_came_back_ends_cancelled(mill: Mill) -> None:
    held = mill.an_acquired_step()
    build_id = build_of(held, mill)
    cancel(mill, build_id)

    mill.clock.advance(21)
    mill.expire()

    assert mill.step(held.step_id).state == "cancelled"
    assert mill.build(build_id).state == "cancelled"
    assert mill.attempts(held.step_id)[0].finished_at == mill.clock()


def test_a_claim_whose_runner_said_bye_ends_cancelled(mill: Mill) -> None:
    held = mill.an_acquired_step()
    build_id = build_of(held, mill)
    cancel(mill, build_id)

    mill.clock.advance(1)
    mill.now(say_bye, mill.site, held.runner.caller)

    assert mill.step(held.step_id).state == "cancelled"
    assert mill.build(build_id).state == "cancelled"


def test_a_runner_that_has_fallen_silent_is_not_waited_for(mill: Mill) -> None:
    held = mill.a_running_step()
    build_id = build_of(held, mill)
    cancel(mill, build_id)

    mill.clock.advance(19)
    assert mill.expire() == 0
    mill.clock.advance(2)
    assert mill.expire() == 1

    assert mill.build(build_id).state == "cancelled"
    assert mill.heartbeat(held.runner, held)[0].action is Action.ABANDON


def test_a_step_that_is_lost_while_it_is_cancelled_is_not_made_ready_again(mill: Mill) -> None:
    mill.clock.advance(100)  # the time after a start in which nobody counts as lost is over
    held = mill.a_running_step()
    build_id = build_of(held, mill)
    mill.clock.advance(50)
    cancel(mill, build_id)

    mill.clock.advance(11)  # silent for longer than a minute, asked to stop eleven seconds ago
    mill.expire()

    assert mill.step(held.step_id).state in ("running", "cancelled")
    mill.clock.advance(10)
    mill.expire()
    assert mill.build(build_id).state == "cancelled"


def test_a_runner_that_speaks_but_does_not_stop_is_waited_for_so_long_and_no_longer(mill: Mill) -> None:
    held = mill.a_running_step()
    build_id = build_of(held, mill)
    cancel(mill, build_id)

    for _ in range(13):
        mill.clock.advance(5)
        assert mill.heartbeat(held.runner, held)[0].action is Action.CANCEL
        assert mill.expire() == 0
    mill.clock.advance(6)
    mill.heartbeat(held.runner, held)
    assert mill.expire() == 1

    assert mill.build(build_id).state == "cancelled"
    with pytest.raises(StaleAttempt):
        mill.append(held, 0, b"late")


def test_a_lost_step_that_waits_again_is_cancelled_at_once(mill: Mill) -> None:
    mill.clock.advance(100)
    held = mill.a_running_step()
    build_id = build_of(held, mill)
    mill.clock.advance(61)
    mill.expire()
    assert mill.step(held.step_id).state == "ready"

    cancel(mill, build_id)

    assert mill.build(build_id).state == "cancelled"
    assert mill.heartbeat(held.runner, held)[0].action is Action.ABANDON


def test_asked_twice_it_gives_the_same_receipt(mill: Mill) -> None:
    build = mill.a_build()

    first = cancel(mill, build.id)

    assert first
    assert cancel(mill, build.id) == first
    assert len(mill.audited("build.cancelled")) == 1


def test_a_build_that_has_ended_otherwise_is_not_cancelled_any_more(mill: Mill) -> None:
    held = mill.an_acquired_step()
    build_id = build_of(held, mill)
    mill.complete(held)

    with pytest.raises(Conflict):
        cancel(mill, build_id)

    assert mill.build(build_id).state == "succeeded"


def test_a_build_that_is_not_there_cannot_be_cancelled(mill: Mill) -> None:
    with pytest.raises(NotFound):
        cancel(mill, "nope")


def test_a_cancel_that_meets_completions_leaves_one_end_for_each_step(mill: Mill) -> None:
    runner = mill.a_runner()
    for _ in range(6):
        build = mill.a_build([a_step("one"), a_step("two"), a_step("behind", ["one", "two"])])
        held = mill.acquire(runner, slots=2)
        for one in held:
            mill.start(one)

        together(
            lambda build=build: cancel(mill, build.id),
            *[lambda one=one: mill.complete(one) for one in held],
        )

        for one in held:  # those that are still asked to stop do so
            mill.complete(one, "failed", reason="cancelled")
        assert_ended_once(mill, build)


def test_a_cancel_that_meets_acquires_lets_nothing_start_afterwards(mill: Mill) -> None:
    runners = [mill.a_runner() for _ in range(3)]
    for _ in range(6):
        build = mill.a_build(a_spec(one=[], two=[], three=[]))

        answers = together(
            lambda build=build: cancel(mill, build.id),
            *[lambda runner=runner: mill.acquire(runner) for runner in runners],
        )

        for held in [one for answer in answers[1:] for one in answer]:  # type: ignore[union-attr]
            try:
                assert mill.start(held).action == "cancel"
                mill.complete(held, "failed", reason="cancelled")
            except StaleAttempt:
                pass  # cancelled before its runner could say a word
        assert mill.build(build.id).state == "cancelled"
        assert set(mill.states(build).values()) == {"cancelled"}


def assert_ended_once(mill: Mill, build: MadeBuild) -> None:
    states = mill.states(build)
    assert set(states.values()) <= {"succeeded", "cancelled", "skipped"}
    assert mill.build(build.id).state == "cancelled"
    ended = [row for row in mill.audited("build.finished") if row.details["buildId"] == build.id]
    assert len(ended) == 1
