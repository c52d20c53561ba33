"""The coordinator's watch: neither a time of day that was set nor its own absence is a silence."""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal
from starlette.applications import Starlette

from coordinator.actions.cancel_build import cancel_build
from coordinator.settings import Settings
from coordinator.watch import Watch
from shared.clock import SteadyClock
from shared.protocol import Action
from tests.factories import LOCAL, Held, Mill, a_step

SECOND = 1_000_000_000
HOUR = 3600.0


class Machine:
    """A machine's clock as the coordinator reads it; what passes and the time of day are moved apart."""

    def __init__(self) -> None:
        self.day = 1_772_352_000 * SECOND
        self.passed = 0
        self.steady = SteadyClock(day=lambda: self.day, passing=lambda: self.passed)

    def __call__(self) -> datetime:
        return self.steady()

    def advance(self, seconds: float) -> datetime:
        self.day += int(seconds * SECOND)
        self.passed += int(seconds * SECOND)
        return self()

    def set_by(self, seconds: float) -> None:
        self.day += int(seconds * SECOND)

    def restart(self) -> None:
        """The next process begins with the time of day as it is now."""
        self.steady = SteadyClock(day=lambda: self.day, passing=lambda: self.passed)


@pytest.fixture
def clock() -> Machine:
    return Machine()


@pytest.fixture
def later(mill: Mill) -> Mill:
    """After the time in which nobody counts as silent."""
    mill.clock.advance(100)
    return mill


JUMPS = pytest.mark.parametrize("jump", [HOUR, -HOUR])


def live_for(mill: Mill, held: Held, seconds: int) -> None:
    """So much time, in which the runner says every 5 s that it lives, and the watch looks."""
    for _ in range(seconds // 5):
        mill.clock.advance(5)
        assert mill.heartbeat(held.runner, held)[0].action is Action.CONTINUE
        assert mill.expire() == 0


# --- the time of day is set


@JUMPS
def test_no_runner_counts_as_silent_because_the_time_of_day_was_set(
    later: Mill, clock: Any, jump: float
) -> None:
    held = later.a_running_step()

    clock.set_by(jump)
    live_for(later, held, 30)

    assert later.step(held.step_id).state == "running"


@JUMPS
def test_a_silent_runner_is_lost_after_a_minute_whatever_the_time_of_day(
    later: Mill, clock: Any, jump: float
) -> None:
    held = later.a_running_step()

    clock.set_by(jump)
    clock.advance(59)
    assert later.expire() == 0
    clock.advance(2)
    assert later.expire() == 1

    assert later.step(held.step_id).reason == "runner_lost"


@JUMPS
def test_claims_queues_limits_and_cancels_last_as_long_as_ever(later: Mill, clock: Any, jump: float) -> None:
    queued = later.a_build([a_step("test", labels=["none-has-it"], queueTimeoutSeconds=30)])
    build = later.a_build(timeout_seconds=30)
    held = later.an_acquired_step()

    clock.set_by(jump)
    clock.advance(19)
    assert later.expire() == 0
    clock.advance(2)
    assert later.expire() == 1  # the claim
    clock.advance(8)
    assert later.expire() == 0
    clock.advance(2)
    assert later.expire() == 2  # the queue and the build

    assert later.step(queued.steps["test"]).reason == "queue_timeout"
    assert later.build(build.id).state in ("queued", "failed")
    assert held.step_id


@JUMPS
def test_a_time_limit_of_a_step_is_as_long_as_ever(later: Mill, clock: Any, jump: float) -> None:
    held = later.a_running_step([a_step("test", timeoutSeconds=30)])

    clock.set_by(jump)
    live_for(later, held, 95)
    clock.advance(7)
    assert later.expire() == 1

    assert later.heartbeat(held.runner, held)[0].reason == "timeout"


@JUMPS
def test_the_order_of_what_happens_stays(later: Mill, clock: Any, jump: float) -> None:
    first = later.a_build()
    clock.set_by(jump)
    second = later.a_build(project_id=first.project_id)
    clock.advance(0.1)
    (held,) = later.acquire(later.a_runner())

    assert held.step_id == first.steps["test"]  # first come, first served
    made = later.audited("build.created")
    assert [row.details["buildId"] for row in made] == [first.id, second.id]
    assert made[0].created_at <= made[1].created_at
    claimed = later.step(held.step_id)
    assert claimed.claimed_at >= claimed.ready_at


@JUMPS
def test_a_coordinator_that_starts_again_at_another_time_of_day_loses_nobody(
    later: Mill, clock: Any, jump: float, new_app: Callable[[Settings], Starlette], settings: Settings
) -> None:
    held = later.a_running_step([a_step("test", timeoutSeconds=600)])
    clock.advance(20)
    clock.set_by(jump)
    clock.restart()

    again = Mill(new_app(settings).state.coordinator, clock)
    assert again.expire() == 0
    live_for(again, held, 120)

    assert again.complete(held).state == "succeeded"


# --- the coordinator was away


def test_a_coordinator_that_was_stopped_gives_its_runners_time_to_come_back(
    later: Mill, portal: BlockingPortal
) -> None:
    held = later.a_running_step()
    waiting = later.a_build([a_step("test", queueTimeoutSeconds=60)])
    watch = Watch(later.state)
    later.clock.advance(1)
    assert portal.call(watch.look) == 0

    later.clock.advance(300)
    assert portal.call(watch.look) == 0
    later.clock.advance(5)
    assert later.heartbeat(held.runner, held)[0].action is Action.CONTINUE
    assert portal.call(watch.look) == 0

    assert later.step(held.step_id).state == "running"
    assert later.states(waiting) == {"test": "ready"}


def test_a_coordinator_that_looks_all_the_time_loses_a_silent_runner_after_a_minute(
    later: Mill, portal: BlockingPortal
) -> None:
    held = later.a_running_step()
    watch = Watch(later.state)
    moved = []
    for _ in range(12):
        later.clock.advance(5.5)
        moved.append(portal.call(watch.look))

    assert sum(moved) == 1
    assert later.step(held.step_id).reason == "runner_lost"


def test_who_was_away_loses_a_runner_that_does_not_come_back_in_the_end(
    later: Mill, portal: BlockingPortal
) -> None:
    held = later.a_running_step()
    watch = Watch(later.state)
    later.clock.advance(300)
    portal.call(watch.look)

    for _ in range(8):
        later.clock.advance(12)
        portal.call(watch.look)

    assert later.step(held.step_id).reason == "runner_lost"


def test_a_cancel_does_not_take_the_absence_of_the_coordinator_for_a_silence(
    later: Mill, portal: BlockingPortal
) -> None:
    held = later.a_running_step()
    watch = Watch(later.state)
    later.clock.advance(300)
    later.now(cancel_build, later.site, LOCAL, later.step(held.step_id).build_id)

    assert portal.call(watch.look) == 0
    later.clock.advance(5)
    assert later.heartbeat(held.runner, held)[0].action is Action.CANCEL


def test_what_was_delivered_late_because_nobody_was_there_to_take_it_counts(
    mill: Mill, clock: Any, new_app: Callable[[Settings], Starlette], settings: Settings
) -> None:
    mill.a_build([a_step("test", timeoutSeconds=60)], timeout_seconds=900)
    (held,) = mill.acquire(mill.a_runner())
    mill.start(held)
    mill.expire()
    clock.advance(1800)
    clock.restart()

    again = Mill(new_app(settings).state.coordinator, clock)
    for _ in range(6):
        clock.advance(5)
        assert again.expire() == 0
    assert again.heartbeat(held.runner, held)[0].action is Action.CONTINUE

    assert again.complete(held).state == "succeeded"
    assert (
        timedelta(seconds=1800) < again.step(held.step_id).finished_at - again.step(held.step_id).started_at
    )
