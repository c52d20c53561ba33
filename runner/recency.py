"""What was used a short while ago, on a clock that nobody can set: one on the wall may jump by an hour."""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from runner.deadline import boot_s


class RecentUse:
    """The uses by this process. What only a former life has used counts as not used: its attempts say so."""

    def __init__(self, clock: Callable[[], float] = boot_s) -> None:
        self._clock = clock
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    def note(self, name: str) -> None:
        """It is used from now on; said before it is looked for, so that nobody removes what is then found."""
        with self._lock:
            self._used[name] = self._clock()

    def is_within(self, name: str, seconds: float) -> bool:
        with self._lock:
            return self._age_s(name) < seconds

    @contextmanager
    def unless_within(self, name: str, seconds: float) -> Iterator[bool]:
        """True when it may be removed now: whoever wants to use it waits until that is done."""
        with self._lock:
            is_free = self._age_s(name) >= seconds
            yield is_free
            if is_free:
                self._used.pop(name, None)

    def _age_s(self, name: str) -> float:
        used = self._used.get(name)
        return math.inf if used is None else self._clock() - used
