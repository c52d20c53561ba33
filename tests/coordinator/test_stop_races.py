"""A stop that comes while a step is on its way back to the queue wins: nothing told to stop waits again."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from sqlalchemy import text, update
from sqlmodel import Session

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.end_stopped_builds import end_stopped_builds
from coordinator.actions.expire_leases import expire_leases
from coordinator.actions.release_step import release_step
from coordinator.actions.stop_overdue_builds import stop_overdue_builds
from coordinator.store import builds, projects
from coordinator.store.dialect import Database
from coordinator.tables import Step, table_of
from shared.reasons import Reason
from shared.states import StepState
from tests.factories import LOCAL, ON_POSTGRES, Mill, a_spec

T = TypeVar("T")
STEPS = table_of(Step)
TIME_LIMIT = 20.0


@pytest.fixture
def later(mill: Mill) -> Mill:
    """After the time in which nobody counts as silent."""
    mill.clock.advance(100)
    return mill


def overtaken(
    mill: Mill,
    database: Database,
    slow: Callable[[], T],
    *,
    holding: Callable[[Session], Any],
    by: Callable[[Session], Any] = lambda tx: None,
) -> T:
    """What `slow` answers if it meets what `holding` holds, and `by` is committed while it waits for it."""
    with ThreadPoolExecutor(1) as pool:

        def overtake(tx: Session) -> Any:
            holding(tx)
            waiting = pool.submit(slow)
            wait_for_a_lock(database)
            by(tx)
            return waiting

        return mill.tx(overtake).result(TIME_LIMIT)


def wait_for_a_lock(database: Database) -> None:
    waits = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    until = time.monotonic() + TIME_LIMIT
    with database.reader.connect() as connection:
        while not connection.execute(waits).scalar_one():
            assert time.monotonic() < until, "nobody waits"
            connection.rollback()  # each look at a moment of its own
            time.sleep(0.01)


def stop(mill: Mill, step_id: str, reason: Reason) -> Callable[[Session], Any]:
    """Tell it to stop in one statement, which holds the step's row and not its build's."""
    told = {"cancel_requested_at": mill.clock(), "cancel_reason": reason}
    return lambda tx: tx.connection().execute(update(STEPS).where(STEPS.c.id == step_id).values(told))


@ON_POSTGRES
def test_a_cancel_wins_over_the_loss_of_the_runner(later: Mill, database: Database) -> None:
    held = later.a_running_step()
    build_id = later.step(held.step_id).build_id
    later.clock.advance(61)

    moved = overtaken(
        later,
        database,
        lambda: later.now(expire_leases, later.site),
        holding=lambda tx: builds.lock_build(tx, build_id),
        by=lambda tx: cancel_build(tx, later.site, LOCAL, build_id, now=later.clock()),
    )

    assert moved == 0
    assert later.step(held.step_id).state == "running"
    assert later.expire() == 1
    assert (later.step(held.step_id).state, later.build(build_id).state) == ("cancelled", "cancelled")


@ON_POSTGRES
def test_the_limit_of_the_build_wins_over_the_loss_of_the_runner(later: Mill, database: Database) -> None:
    build = later.a_build(timeout_seconds=60)
    (held,) = later.acquire(later.a_runner())
    later.start(held)
    later.clock.advance(61)

    moved = overtaken(
        later,
        database,
        lambda: later.now(expire_leases, later.site),
        holding=lambda tx: builds.lock_build(tx, build.id),
        by=lambda tx: stop_overdue_builds(tx, later.site, now=later.clock()),
    )

    assert moved == 0
    assert later.expire() == 1
    assert (later.build(build.id).state, later.build(build.id).reason) == ("failed", "build_timeout")


@ON_POSTGRES
def test_a_limit_of_the_step_wins_over_its_next_attempt(later: Mill, database: Database) -> None:
    held = later.a_running_step()

    overtaken(
        later,
        database,
        lambda: later.complete(held, "failed", reason="daemon_error"),
        holding=stop(later, held.step_id, Reason.TIMEOUT),
    )

    step = later.step(held.step_id)
    assert (step.state, step.reason) == ("failed", "timeout")
    assert later.build(step.build_id).state == "failed"


@ON_POSTGRES
def test_a_limit_of_the_step_wins_over_giving_it_back(later: Mill, database: Database) -> None:
    held = later.an_acquired_step()
    later.heartbeat(held.runner, held)
    step = (later.site, held.runner.caller, held.step_id, held.proof)

    overtaken(
        later,
        database,
        lambda: later.now(release_step, *step, reason="no room"),
        holding=stop(later, held.step_id, Reason.PULL_TIMEOUT),
    )

    row = later.step(held.step_id)
    assert (row.state, row.reason) == ("failed", "pull_timeout")
    assert later.build(row.build_id).state == "failed"


# The net


def strand(mill: Mill, step_id: str) -> None:
    """Put the step back into the queue, as no action may."""
    back = update(STEPS).where(STEPS.c.id == step_id).values(state=StepState.READY, finished_at=None)
    mill.tx(lambda tx: tx.connection().execute(back))


def test_what_waits_in_a_cancelled_build_is_ended(later: Mill) -> None:
    held = later.a_running_step()
    build_id = later.step(held.step_id).build_id
    later.now(cancel_build, later.site, LOCAL, build_id)
    strand(later, held.step_id)

    assert later.now(end_stopped_builds, later.site) == 1
    assert later.now(end_stopped_builds, later.site) == 0

    assert (later.step(held.step_id).state, later.build(build_id).state) == ("cancelled", "cancelled")
    assert len(later.audited("build.stopped")) == 1


def test_what_waits_in_a_build_that_is_overdue_is_ended(later: Mill) -> None:
    build = later.a_build(a_spec(one=[], two=["one"]), timeout_seconds=60)
    (held,) = later.acquire(later.a_runner())
    later.start(held)
    later.clock.advance(61)
    later.now(stop_overdue_builds, later.site)
    strand(later, held.step_id)

    assert later.expire() == 1
    assert later.expire() == 0

    assert later.states(build) == {"one": "skipped", "two": "skipped"}
    assert (later.build(build.id).state, later.build(build.id).reason) == ("failed", "build_timeout")


def test_what_waits_in_a_build_that_goes_on_is_left_alone(later: Mill) -> None:
    build = later.a_build(a_spec(one=[], two=["one"], three=[]))
    later.acquire(later.a_runner())

    assert later.now(end_stopped_builds, later.site) == 0

    assert sorted(later.states(build).values()) == ["claimed", "pending", "ready"]


@ON_POSTGRES
def test_a_build_is_cancelled_while_a_retry_of_it_has_the_project_and_waits(mill: Mill) -> None:
    build = mill.a_build(a_spec(build=[]))

    def hold_the_project(tx: Session) -> str:
        projects.lock_project(tx, build.project_id)
        with ThreadPoolExecutor(1) as pool:
            cancelled = pool.submit(mill.now, cancel_build, mill.site, LOCAL, build.id)
            return str(cancelled.result(TIME_LIMIT).state)

    assert mill.tx(hold_the_project) == "cancelled"
