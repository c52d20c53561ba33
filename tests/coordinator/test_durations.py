"""What is remembered of how long steps took, and the estimate that is made from it."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import Session

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.change_workflow import change_workflow
from coordinator.actions.complete_step import complete_bare_step
from coordinator.actions.estimate_completion import estimate_completion
from coordinator.actions.retry_build import StepsToRetry, retry_build
from coordinator.rules.estimate import StepTimes
from coordinator.store import builds, durations, projects, rounds, steps
from coordinator.tables import Build, table_of
from shared.ids import new_id
from shared.protocol import Completion
from shared.states import BuildState
from tests.factories import LOCAL, Held, MadeBuild, MadeRunner, Mill, a_spec

CHAIN = a_spec(compile=[], test=["compile"])


@pytest.fixture
def runner(mill: Mill) -> MadeRunner:
    return mill.a_runner()


def took(ran: float, *, waited: float = 0, prepared: float = 0) -> StepTimes:
    return StepTimes(timedelta(seconds=waited), timedelta(seconds=prepared), timedelta(seconds=ran))


def run_step(
    mill: Mill,
    runner: MadeRunner,
    ran: float,
    *,
    waited: float = 0,
    prepared: float = 0,
    status: str = "success",
    **said: Any,
) -> Held:
    """Let the one step that is ready take so long."""
    mill.clock.advance(waited)
    (held,) = mill.acquire(runner)
    mill.clock.advance(prepared)
    mill.start(held)
    mill.clock.advance(ran)
    mill.complete(held, status, **said)
    return held


def run_through(mill: Mill, runner: MadeRunner, *ran: float) -> None:
    """Let one step after the other take so long, each at once taken and at once begun."""
    for one in ran:
        run_step(mill, runner, one)


def a_history(mill: Mill, runner: MadeRunner, *ran: float) -> MadeBuild:
    """A first build of a chain of two steps, and how long they took in it."""
    build = mill.a_build(CHAIN)
    run_through(mill, runner, *ran)
    return build


def another(mill: Mill, build: MadeBuild) -> MadeBuild:
    return mill.another_build(build.project_id, build.workflow_id)


def remembered(mill: Mill, build: MadeBuild, *names: str) -> dict[str, list[StepTimes]]:
    names = names or ("compile", "test")
    return mill.tx(durations.list_recent_times, build.project_id, build.workflow_id, names)


def runs_of(times: Mapping[str, Sequence[StepTimes]], name: str) -> list[float]:
    return sorted(one.ran.total_seconds() for one in times.get(name, ()))


def estimate(mill: Mill, build: MadeBuild) -> datetime | None:
    def look(tx: Session) -> datetime | None:
        row = builds.get_build(tx, build.id)
        return estimate_completion(tx, row, steps.list_steps(tx, build.id), now=mill.clock())

    return mill.tx(look)


def seconds_left(mill: Mill, build: MadeBuild) -> float | None:
    moment = estimate(mill, build)
    return None if moment is None else (moment - mill.clock()).total_seconds()


def copy(tx: Session, build: MadeBuild, **values: Any) -> None:
    """A row beside the build's own, with the next number."""
    row = builds.get_build(tx, build.id).model_dump()
    number = projects.take_build_number(tx, build.project_id)
    builds.insert_build(tx, Build(**{**row, "id": new_id(), "number": number, **values}))


# --- what is remembered


def test_the_wait_the_preparation_and_the_run_are_told_apart(mill: Mill, runner: MadeRunner) -> None:
    build = mill.a_build(a_spec(test=[]))

    run_step(mill, runner, 60, waited=7, prepared=3)

    assert remembered(mill, build) == {"test": [took(60, waited=7, prepared=3)]}


def test_only_the_names_that_are_asked_for_are_read(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)

    assert remembered(mill, build, "test", "renamed") == {"test": [took(20)]}
    assert mill.tx(durations.list_recent_times, build.project_id, build.workflow_id, ()) == {}


def test_only_the_newest_builds_that_succeeded_are_remembered(mill: Mill, runner: MadeRunner) -> None:
    build = mill.a_build(a_spec(test=[]))
    run_through(mill, runner, 1000)
    for turn in range(durations.MOST_BUILDS):
        another(mill, build)
        run_through(mill, runner, turn)

    assert runs_of(remembered(mill, build), "test") == list(range(durations.MOST_BUILDS))


def test_of_builds_with_very_many_steps_only_three_are_read(
    mill: Mill, runner: MadeRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durations, "ENOUGH_ROWS", 4)
    build = a_history(mill, runner, 1, 1)
    for turn in (2, 3, 4):
        another(mill, build)
        run_through(mill, runner, turn, turn)

    assert runs_of(remembered(mill, build), "test") == [2, 3, 4]


def test_a_build_that_failed_tells_nothing(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    another(mill, build)
    run_step(mill, runner, 1)
    run_step(mill, runner, 2, status="failed", reason="exit_nonzero", exit_code=1)

    assert remembered(mill, build) == {"compile": [took(10)], "test": [took(20)]}


def test_another_workflow_and_another_project_tell_nothing(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    mill.a_build(CHAIN, project_id=build.project_id)
    run_through(mill, runner, 300, 400)
    a_history(mill, runner, 500, 600)

    assert remembered(mill, build) == {"compile": [took(10)], "test": [took(20)]}


def test_builds_that_lie_far_back_are_not_searched_for(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    other = mill.a_workflow(build.project_id, CHAIN)

    def make(tx: Session) -> None:
        for _ in range(durations.MOST_LOOKED_AT):
            copy(tx, build, workflow_id=other)

    mill.tx(make)

    assert remembered(mill, build) == {}


def test_the_attempt_that_succeeded_is_the_one_that_counts(mill: Mill, runner: MadeRunner) -> None:
    build = mill.a_build(a_spec(test=[]))
    run_step(mill, runner, 500, status="failed", reason="daemon_error")

    run_step(mill, runner, 60, waited=10 + 4, prepared=3)  # ten seconds have to pass between the attempts

    assert mill.step(build.steps["test"]).attempt == 2
    assert remembered(mill, build) == {"test": [took(60, waited=4, prepared=3)]}


def test_a_build_that_ran_again_counts_once_for_each_step(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    mill.now(retry_build, LOCAL, build.id, StepsToRetry("all"))
    run_through(mill, runner, 30, 40)

    assert remembered(mill, build) == {"compile": [took(30)], "test": [took(40)]}


def test_a_step_that_was_only_reported_as_done_tells_no_duration(mill: Mill) -> None:
    build = mill.a_build(a_spec(test=[]))
    done = Completion.model_validate({"status": "success"})

    mill.now(complete_bare_step, mill.site, LOCAL, build.steps["test"], done)

    assert mill.build(build.id).state == BuildState.SUCCEEDED
    assert remembered(mill, build) == {}


def test_no_part_is_negative_when_the_clock_was_set_back(mill: Mill, runner: MadeRunner) -> None:
    build = mill.a_build(a_spec(test=[]))

    run_step(mill, runner, -60, waited=-5, prepared=-7)

    assert remembered(mill, build) == {"test": [took(0)]}


# --- the estimate


def test_a_build_that_nobody_has_begun_takes_what_it_usually_takes(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)

    fresh = another(mill, build)

    assert mill.build(fresh.id).state == BuildState.QUEUED
    assert seconds_left(mill, fresh) == 30


def test_the_estimate_stays_where_it_is_as_long_as_all_goes_as_usual(mill: Mill, runner: MadeRunner) -> None:
    build = mill.a_build(CHAIN)
    run_step(mill, runner, 10, waited=2, prepared=3)
    run_step(mill, runner, 20, waited=4, prepared=5)
    fresh = another(mill, build)
    first = estimate(mill, fresh)
    seen = []

    for waited, prepared, ran in ((2, 3, 10), (4, 5, 20)):
        mill.clock.advance(waited)
        seen.append(estimate(mill, fresh))
        (held,) = mill.acquire(runner)
        mill.clock.advance(prepared)
        seen.append(estimate(mill, fresh))
        mill.start(held)
        mill.clock.advance(ran / 2)
        seen.append(estimate(mill, fresh))
        mill.clock.advance(ran / 2)
        mill.complete(held)

    off = [abs((moment - first).total_seconds()) for moment in seen]
    assert max(off) <= 0.5  # a tenth of the part that is just over
    assert mill.build(fresh.id).finished_at == first


def test_an_estimate_never_lies_in_the_past(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    fresh = another(mill, build)
    run_through(mill, runner, 10)
    (held,) = mill.acquire(runner)
    mill.start(held)

    mill.clock.advance(100_000)

    assert seconds_left(mill, fresh) == 2


def test_without_a_history_of_each_step_that_is_left_nothing_is_said(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    renamed = a_spec(compile=[], verify=["compile"])
    mill.now(
        change_workflow, mill.site, LOCAL, build.project_id, build.workflow_id, name="new", steps=renamed
    )

    fresh = another(mill, build)

    assert set(fresh.steps) == {"compile", "verify"}
    assert estimate(mill, fresh) is None


def test_a_step_that_has_ended_needs_no_history(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    renamed = a_spec(build=[], test=["build"])
    mill.now(
        change_workflow, mill.site, LOCAL, build.project_id, build.workflow_id, name="new", steps=renamed
    )
    fresh = another(mill, build)

    run_through(mill, runner, 10)

    assert seconds_left(mill, fresh) == 20


@pytest.mark.parametrize("state", [state for state in BuildState if state not in ("queued", "running")])
def test_a_build_that_is_not_in_progress_has_no_estimate(
    mill: Mill, runner: MadeRunner, state: BuildState
) -> None:
    build = another(mill, a_history(mill, runner, 10, 20))
    rows = table_of(Build)

    mill.tx(lambda tx: tx.connection().execute(update(rows).where(rows.c.id == build.id).values(state=state)))

    assert estimate(mill, build) is None


def test_a_cancelled_build_loses_its_estimate_at_once(mill: Mill, runner: MadeRunner) -> None:
    build = another(mill, a_history(mill, runner, 10, 20))
    (held,) = mill.acquire(runner)
    mill.start(held)
    assert estimate(mill, build) is not None

    mill.now(cancel_build, mill.site, LOCAL, build.id)

    assert mill.build(build.id).state == BuildState.CANCELLING
    assert estimate(mill, build) is None


def test_a_retry_takes_as_long_as_what_is_run_again(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    again = another(mill, build)
    run_step(mill, runner, 10)
    run_step(mill, runner, 1, status="failed", reason="exit_nonzero", exit_code=1)

    mill.now(retry_build, LOCAL, again.id, StepsToRetry("failed"))

    assert seconds_left(mill, again) == 20


def test_the_rows_of_all_rounds_lead_to_the_same_estimate(mill: Mill, runner: MadeRunner) -> None:
    build = a_history(mill, runner, 10, 20)
    again = another(mill, build)
    run_step(mill, runner, 1, status="failed", reason="exit_nonzero", exit_code=1)
    mill.now(retry_build, LOCAL, again.id, StepsToRetry("failed"))

    def look(tx: Session) -> datetime | None:
        row = builds.get_build(tx, again.id)
        return estimate_completion(tx, row, rounds.list_all_steps(tx, again.id), now=mill.clock())

    assert mill.tx(look) == estimate(mill, again) == mill.clock() + timedelta(seconds=30)


def test_steps_that_wait_for_each_others_slot_wait_as_they_did_before(mill: Mill, runner: MadeRunner) -> None:
    """One slot and two steps beside each other: the second waits for the first, now as then."""
    build = mill.a_build(a_spec(left=[], right=[]))
    run_through(mill, runner, 10, 20)

    fresh = another(mill, build)

    assert seconds_left(mill, fresh) == 30
