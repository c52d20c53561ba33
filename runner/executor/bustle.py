"""Tells whether steps are being brought up or wound down, so that work nobody waits for can stand aside.

On a machine with few cores a network that is made ahead, or one that is taken away, costs the steps of that
moment as much time as it takes itself.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

SETTLED_S: Final = 0.3  # so long after its last sign an attempt counts as busy


class Bustle:
    """Which attempts made use of the engine a moment ago; any number of threads may use it."""

    def __init__(self, *, cores: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        # With many cores a few busy attempts leave enough of them for everything else.
        self._most = max(1, (cores or os.cpu_count() or 1) // 2)
        self._clock = clock
        self._seen: dict[str, float] = {}
        self._working: set[str] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def note(self, attempt: str) -> None:
        """This attempt was brought up or wound down a bit right now."""
        with self._lock:
            self._seen[attempt] = self._clock()

    @contextmanager
    def working_on(self, attempt: str) -> Iterator[None]:
        with self._lock:
            self._working.add(attempt)
        try:
            yield
        finally:
            with self._lock:
                self._working.discard(attempt)
                self._seen[attempt] = self._clock()

    def until_quiet(self) -> float:
        """How many seconds it takes until few enough are busy, if no more is heard; 0.0 when it is so."""
        with self._lock:
            now = self._clock()
            self._seen = {one: at for one, at in self._seen.items() if now - at < SETTLED_S}
            busy = {**self._seen, **dict.fromkeys(self._working, now)}
            if len(busy) < self._most or self._over.is_set():
                return 0.0
            return sorted(at + SETTLED_S - now for at in busy.values())[-self._most]

    def wait_for_quiet(self, longest_s: float) -> None:
        until = self._clock() + longest_s
        while (left_s := min(self.until_quiet(), until - self._clock())) > 0:
            self._over.wait(left_s)

    def end(self) -> None:
        """Nobody waits any more."""
        self._over.set()
