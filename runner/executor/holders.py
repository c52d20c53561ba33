"""Networks kept ahead of need: making one takes longer than starting a step, joining one costs nothing.

A holder is a container that does nothing but own a network of its own. It serves one attempt and is thrown
away with it, so that no two attempts ever share addresses, ports or localhost.
"""

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final

import structlog

from runner.errors import RunnerError

SETTLE_S: Final = 0.3
LONGEST_QUIET_S: Final = 3.0
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0

_log = structlog.get_logger(__name__)


class HolderPool:
    """Holders by kind of network; a thread of its own keeps `ahead` of each ready."""

    def __init__(
        self,
        make: Callable[[str], str],
        remove: Callable[[str], None],
        *,
        ahead: Mapping[str, int],
        wait_for_quiet: Callable[[float], object] = lambda _longest_s: None,
    ) -> None:
        self._make = make
        self._remove = remove
        self._wait_for_quiet = wait_for_quiet
        self._ahead = dict(ahead)
        self._ready: dict[str, deque[str]] = {kind: deque() for kind in ahead}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._keep_filled, name="holders", daemon=True)
        self._thread.start()

    def take(self, kind: str) -> str:
        """A holder that nobody had before; made on the spot when none is ready."""
        with self._changed:
            ready = self._ready.get(kind)
            if ready:
                self._changed.notify_all()
                return ready.popleft()
        return self._make(kind)

    def count_ready(self, kind: str) -> int:
        with self._changed:
            return len(self._ready.get(kind, ()))

    def list_ready(self) -> list[str]:
        with self._changed:
            return [holder for ready in self._ready.values() for holder in ready]

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

    def _missing(self) -> str | None:
        lacking = (kind for kind, count in self._ahead.items() if len(self._ready[kind]) < count)
        return next(lacking, None)

    def _keep_filled(self) -> None:
        pause_s = FIRST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._missing() is not None)
                if self._closed:
                    return
                # Whoever took the last one starts a step right now, and making another would slow that down.
                if self._changed.wait_for(lambda: self._closed, SETTLE_S):
                    return
                kind = self._missing()
            if kind is None:
                continue
            self._wait_for_quiet(LONGEST_QUIET_S)
            try:
                holder = self._make(kind)
            except RunnerError as error:
                _log.warning(
                    "no network could be made ahead", network=kind, error=str(error), pause_s=pause_s
                )
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                continue
            pause_s = FIRST_PAUSE_S
            self._keep(kind, holder)

    def _keep(self, kind: str, holder: str) -> None:
        with self._changed:
            if not self._closed:
                self._ready[kind].append(holder)
                self._changed.notify_all()
                return
        self._remove_all([holder])

    def _remove_all(self, holders: list[str]) -> None:
        for holder in holders:
            try:
                self._remove(holder)
            except RunnerError as error:
                _log.warning("a network holder stays behind", holder=holder, error=str(error))
