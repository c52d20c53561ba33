"""Networks kept ahead of need: making one takes longer than starting a step, joining one costs nothing.

A holder is a container that does nothing but own a network of its own. It serves one attempt and is thrown
away with it, so that no two attempts ever share addresses, ports or localhost.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from runner.errors import RunnerError

LONGEST_QUIET_S: Final = 3.0
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
LONGEST_MAKING_S: Final = 60.0
# Steps that follow each other quickly use up more than can be made meanwhile.
MOST_TIMES: Final = 4
BUSY_S: Final = 900.0
RUSH_S: Final = 2.0
LOOK_S: Final = 60.0
JOINED_S: Final = 300.0  # so long after it was taken its step has joined it, or never will

_log = structlog.get_logger(__name__)


class HolderPool:
    """Holders by kind of network, made by a thread of its own.

    At least `ahead` of each kind are kept ready, and as many as were taken lately up to four times that.
    """

    def __init__(
        self,
        make: Callable[[str], str],
        remove: Callable[[str], None],
        *,
        ahead: Mapping[str, int],
        until_quiet: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make = make
        self._remove = remove
        self._until_quiet = until_quiet
        self._clock = clock
        self._ahead = dict(ahead)
        self._ready: dict[str, deque[str]] = {kind: deque() for kind in ahead}
        self._taken: dict[str, deque[float]] = {
            kind: deque(maxlen=count * MOST_TIMES) for kind, count in ahead.items()
        }
        self._given: deque[tuple[float, str]] = deque()
        self._making: str | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._keep_filled, name="holders", daemon=True)
        self._thread.start()

    def take(self, kind: str) -> str:
        """A holder that nobody had before; made on the spot when none is ready or about to be."""
        with self._changed:
            ready = self._ready.get(kind)
            if ready is not None:
                self._taken[kind].append(self._clock())
                self._changed.notify_all()
                self._changed.wait_for(lambda: ready or self._making != kind, LONGEST_MAKING_S)
                if ready:
                    return self._give(ready)
        return self._make(kind)

    def _give(self, ready: deque[str]) -> str:
        holder = ready.popleft()
        self._given.append((self._clock(), holder))
        self._forget_joined()
        return holder

    def _forget_joined(self) -> None:
        while self._given and self._given[0][0] < self._clock() - JOINED_S:
            self._given.popleft()

    def count_ready(self, kind: str) -> int:
        with self._changed:
            return len(self._ready.get(kind, ()))

    def list_ready(self) -> list[str]:
        with self._changed:
            return [holder for ready in self._ready.values() for holder in ready]

    def list_spared(self) -> list[str]:
        """What is ready, and what was taken so lately that its step may be about to join it."""
        with self._changed:
            self._forget_joined()
            return [*self.list_ready(), *(holder for _, holder in self._given)]

    def wait_until_full(self, timeout_s: float) -> bool:
        """Wait until nothing is missing; False when that took too long."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or not self._missing(), timeout_s)

    def forget_ready(self) -> None:
        """Throw away all that is ready, as after a restart of the engine, which kills them."""
        with self._changed:
            stale = [holder for ready in self._ready.values() for holder in ready]
            for ready in self._ready.values():
                ready.clear()
            self._changed.notify_all()
        self._remove_all(stale)

    def close(self) -> None:
        """Stop keeping and remove what is ready; holders that were taken stay."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=LONGEST_PAUSE_S)
        self.forget_ready()

    def _wanted(self, kind: str) -> int:
        return max(self._ahead[kind], self._count_taken(kind, BUSY_S))

    def _count_taken(self, kind: str, within_s: float) -> int:
        since = self._clock() - within_s
        return sum(at >= since for at in self._taken[kind])

    def _missing(self) -> str | None:
        lacking = (kind for kind, ready in self._ready.items() if len(ready) < self._wanted(kind))
        return next(lacking, None)

    def _take_surplus(self) -> list[str]:
        """One that nobody will want soon, the oldest first."""
        for kind, ready in self._ready.items():
            if len(ready) > self._wanted(kind):
                return [ready.popleft()]
        return []

    def _keep_filled(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._missing() is not None, LOOK_S)
                if self._closed:
                    return
                kind = self._missing()
                surplus = self._take_surplus() if kind is None else []
            if kind is None:
                self._remove_all(surplus)
                continue
            self._await_quiet(kind)
            if self._make_one(kind):
                pause_s = FIRST_PAUSE_S
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._closed, pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _await_quiet(self, kind: str) -> None:
        """Whoever takes one starts a step right now, and making another would slow that down.

        It does not wait where steps come so quickly that the next one finds none.
        """
        until = self._clock() + LONGEST_QUIET_S
        with self._changed:
            while not self._closed and (self._ready[kind] or self._count_taken(kind, RUSH_S) < 2):
                left_s = min(self._until_quiet(), until - self._clock())
                if left_s <= 0:
                    return
                self._changed.wait(left_s)

    def _make_one(self, kind: str) -> bool:
        """False when the engine does not let us."""
        made: str | None = None
        with self._changed:
            self._making = kind
        try:
            made = self._make(kind)
        except RunnerError as error:
            _log.warning("no network could be made ahead", network=kind, error=str(error))
        finally:
            self._keep(kind, made)
        return made is not None

    def _keep(self, kind: str, made: str | None) -> None:
        with self._changed:
            self._making = None
            self._changed.notify_all()
            if made is not None and not self._closed:
                self._ready[kind].append(made)
                return
        if made is not None:
            self._remove_all([made])

    def _remove_all(self, holders: list[str]) -> None:
        for holder in holders:
            try:
                self._remove(holder)
            except RunnerError as error:
                _log.warning("a network holder stays behind", holder=holder, error=str(error))
