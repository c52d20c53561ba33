"""A clock that begins at the time of day and does not jump with it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest

from shared.clock import SteadyClock, to_wire, utc_now

SECOND = 1_000_000_000
HOUR = timedelta(hours=1)
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@dataclass
class Machine:
    """Time of day and time that passes, in nanoseconds; the first can be set."""

    day: int = int(NOON.timestamp()) * SECOND
    passed: int = 5 * SECOND

    def wait(self, seconds: float) -> None:
        self.day += int(seconds * SECOND)
        self.passed += int(seconds * SECOND)

    def set_by(self, change: timedelta) -> None:
        self.day += int(change.total_seconds()) * SECOND

    def clock(self) -> SteadyClock:
        return SteadyClock(day=lambda: self.day, passing=lambda: self.passed)


def test_it_begins_at_the_time_of_day_and_counts_what_passes() -> None:
    machine = Machine()
    clock = machine.clock()

    assert clock() == NOON
    machine.wait(90.5)
    assert clock() == NOON + timedelta(seconds=90.5)


@pytest.mark.parametrize("change", [HOUR, -HOUR])
def test_a_minute_lasts_a_minute_when_the_time_of_day_is_set_by_an_hour(change: timedelta) -> None:
    machine = Machine()
    clock = machine.clock()
    clock()

    machine.set_by(change)
    machine.wait(60)

    assert abs(clock() - (NOON + timedelta(seconds=60))) <= timedelta(seconds=0.6)


@pytest.mark.parametrize("change", [HOUR, -HOUR])
def test_it_never_goes_back(change: timedelta) -> None:
    machine = Machine()
    clock = machine.clock()
    seen = []
    for second in range(100):
        if second == 50:
            machine.set_by(change)
        machine.wait(0.5)
        seen.append(clock())

    assert seen == sorted(set(seen))


@pytest.mark.parametrize("change", [HOUR, -HOUR])
def test_it_agrees_with_the_time_of_day_again_after_a_while(change: timedelta) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.set_by(change)

    machine.wait(101 * 3600)

    assert clock() == NOON + timedelta(hours=101) + change


def test_it_follows_a_clock_that_is_a_little_fast() -> None:
    machine = Machine()
    clock = machine.clock()
    for _ in range(1000):
        machine.wait(1)
        machine.day += SECOND // 10_000

        clock()

    assert clock() == NOON + timedelta(seconds=1000.1)


def test_the_real_one_tells_the_time_of_day() -> None:
    clock = SteadyClock()

    assert abs(clock() - utc_now()) < timedelta(seconds=5)
    assert to_wire(clock()).endswith("Z")
