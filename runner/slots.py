"""A bounded number of threads that says how many are free."""

import threading
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Slots:
    """Runs at most `count` pieces of work at once."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._busy = 0
        self._changed = threading.Condition()

    @property
    def free(self) -> int:
        with self._changed:
            return max(0, self._count - self._busy)

    @property
    def busy(self) -> int:
        with self._changed:
            return self._busy

    def run(self, name: str, work: Callable[[], None]) -> None:
        """Begin `work` in a thread of its own; an adopted attempt may take more than the count."""
        with self._changed:
            self._busy += 1
        threading.Thread(target=self._work, args=(name, work), name=name, daemon=True).start()

    def wait_until_free(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._busy < self._count, timeout_s)

    def wait_until_idle(self, timeout_s: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._busy == 0, timeout_s)

    def _work(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            log.exception("work_failed", work=name)  # its journal stays; the next start goes on with it
        finally:
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()
