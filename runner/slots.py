"""A bounded number of threads that says how many are free."""

import threading
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Slots:
    """Runs at most `count` pieces of work at once. What a piece does after `release` takes no slot."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._busy = 0
        self._threads = 0
        self._changed = threading.Condition()

    @property
    def free(self) -> int:
        with self._changed:
            return max(0, self._count - self._busy)

    @property
    def busy(self) -> int:
        with self._changed:
            return self._busy

    def run(self, name: str, work: Callable[[Callable[[], None]], None]) -> None:
        """Begin `work` in a thread of its own; an adopted attempt may take more than the count.

        It is handed `release`, which gives its slot back before it has ended.
        """
        with self._changed:
            self._busy += 1
            self._threads += 1
        threading.Thread(target=self._work, args=(name, work), name=name, daemon=True).start()

    def wait_until_free(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._busy < self._count, timeout_s)

    def wait_until_idle(self, timeout_s: float) -> bool:
        """True when no piece of work is left, cleaning up included."""
        with self._changed:
            return self._changed.wait_for(lambda: self._threads == 0, timeout_s)

    def _work(self, name: str, work: Callable[[Callable[[], None]], None]) -> None:
        held = True

        def release() -> None:
            nonlocal held
            with self._changed:
                self._busy -= held
                held = False
                self._changed.notify_all()

        try:
            work(release)
        except Exception:
            log.exception("work_failed", work=name)  # the janitor takes away what it left
        finally:
            release()
            with self._changed:
                self._threads -= 1
                self._changed.notify_all()
