"""Time as the programs tell it to each other: RFC 3339 in UTC, and a clock that does not jump."""

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

Clock = Callable[[], datetime]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FOLLOWS = 100  # by one part in so many of what has passed, a steady clock follows the time of day


def utc_now() -> datetime:
    return datetime.now(UTC)


def to_wire(moment: datetime) -> str:
    """RFC 3339 with milliseconds and `Z`."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment_of(nanoseconds: int) -> datetime:
    """The moment so long after the beginning of 1970."""
    return _EPOCH + timedelta(microseconds=nanoseconds // 1000)


def time_that_passes() -> int:
    """Nanoseconds that nobody can set; they also pass while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class SteadyClock:
    """Begins at the time of day and then counts what passes, so that leases and limits last as they should.

    `begins`: where it begins instead, to go on where another one stood.

    Someone may set the time of day by hours meanwhile: this clock goes on, at most 1 % faster or slower
    until both agree again, and never back.
    """

    def __init__(
        self,
        *,
        day: Callable[[], int] = time.time_ns,
        passing: Callable[[], int] = time_that_passes,
        begins: datetime | None = None,
    ) -> None:
        self._day = day
        self._passing = passing
        self._lock = threading.Lock()
        self._seen = passing()
        self._now = day() if begins is None else (begins - _EPOCH) // timedelta(microseconds=1) * 1000

    def __call__(self) -> datetime:
        return moment_of(self.nanoseconds())

    def nanoseconds(self) -> int:
        """Since the beginning of 1970."""
        return self.reading()[1]

    def reading(self) -> tuple[int, int]:
        """What has passed by the machine, and what this clock shows at that moment."""
        with self._lock:
            seen = self._passing()
            passed, self._seen = max(0, seen - self._seen), seen
            self._now += passed
            most = passed // _FOLLOWS
            self._now += max(-most, min(most, self._day() - self._now))
            return seen, self._now
