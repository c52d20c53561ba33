"""The coordinator's clock from one process to the next: what is in the database is never in its future.

While the machine stays up a new process goes on where the last one stood, plus what has passed since, so that
a time of day that was set meanwhile moves no lease and no limit. After a boot nothing but the time of day
can say how long the machine was off; then the clock begins with it, but not before the last moment it showed.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import structlog
from sqlmodel import Session

from coordinator.errors import CoordinatorError
from coordinator.store import clock_marks
from coordinator.store.lanes import Lanes
from shared.clock import SteadyClock, moment_of, time_that_passes

log = structlog.get_logger()

EVERY_S = 5.0
DOUBTFUL = timedelta(days=1)  # a time of day so far ahead was set right: the clock had been wrong before
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _boot_id() -> str:
    """Which boot of which machine this is; none is known where the system does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Machine:
    """What the machine says of time: nanoseconds of the day, of what passes, and since which boot."""

    day: Callable[[], int] = time.time_ns
    passing: Callable[[], int] = time_that_passes
    boot_id: Callable[[], str] = _boot_id


THIS_MACHINE = Machine()


def begin_clock(lanes: Lanes, machine: Machine = THIS_MACHINE) -> SteadyClock:
    """The clock of this process, which goes on where the last one stood."""
    boot_id = machine.boot_id()
    mark = lanes.write_and_wait(partial(clock_marks.find_mark, boot_id=boot_id)) if boot_id else None
    latest = lanes.write_and_wait(clock_marks.find_latest)
    day = moment_of(machine.day())
    begins = day if latest is None else max(day, latest)
    if mark is not None and (passed_ns := machine.passing() - mark.passed_ns) >= 0:
        begins = mark.at + timedelta(microseconds=passed_ns // 1000)
    if day - begins > DOUBTFUL:
        begins = day
    if begins != day:
        log.info("clock_goes_on", ahead_of_time_of_day_s=round((begins - day).total_seconds(), 3))
    return SteadyClock(day=machine.day, passing=machine.passing, begins=begins)


def mark_time(tx: Session, clock: SteadyClock, machine: Machine = THIS_MACHINE) -> None:
    """Write down where the clock stands now."""
    passed_ns, now_ns = clock.reading()
    clock_marks.write_mark(tx, machine.boot_id(), passed_ns, moment_of(now_ns))


async def keep_time(lanes: Lanes, clock: SteadyClock, machine: Machine = THIS_MACHINE) -> None:
    """Until cancelled: every few seconds where the clock stands."""
    while True:
        try:
            await lanes.write(partial(mark_time, clock=clock, machine=machine))
        except (CoordinatorError, OSError) as error:
            log.warning("clock_not_kept", cause=str(error))
        except Exception:  # the last line of defence: the next restart would not know what time it is
            log.exception("clock_not_kept")
        await asyncio.sleep(EVERY_S)
