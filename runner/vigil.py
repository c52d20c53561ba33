"""Keeps the time limits of steps that a former life left running, while the coordinator cannot be asked.

Only what the journal itself says is done here: a deadline was written down, and it has passed. All else, the
outcome included, waits for the coordinator's word. The limit of silence waits too: in a copy of a state
folder the log of a step stands still, and the step is another process's.
"""

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import structlog

from runner.deadline import Deadline, Moment
from runner.errors import RunnerError
from runner.executor.base import Executor, Job
from runner.journal import Journal, JournalPhase
from shared.reasons import Reason

log = structlog.get_logger()

LOOK_S = 0.5
JOIN_S = 5.0


@dataclass
class Watched:
    """A step whose script may run; `job` is enough to find and to kill it."""

    journal: Journal
    job: Job
    grace_s: float
    has_term: bool = False
    is_over: bool = False


class Vigil:
    """Watches in a thread of its own, from `with` on to its end; afterwards no journal is written here."""

    def __init__(self, executor: Executor, watched: Iterable[Watched]) -> None:
        self._executor = executor
        self._watched = [one for one in watched if one.journal.phase is JournalPhase.RUNNING]
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="vigil", daemon=True)

    def __enter__(self) -> Self:
        if self._watched:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._stopping.set()
        if self._watched:
            self._thread.join(JOIN_S)  # a kill that is under way may last longer, and be sent twice

    def _run(self) -> None:
        while not self._stopping.wait(LOOK_S):
            for one in self._watched:
                if one.is_over or self._stopping.is_set():
                    continue
                try:
                    self._look(one)
                except (RunnerError, OSError) as error:
                    log.warning("limit_not_kept", job=one.job.name, cause=str(error))  # yet; it looks again
                except Exception:  # the other steps have limits as well
                    log.exception("limit_not_kept", job=one.job.name)

    def _look(self, one: Watched) -> None:
        begun = one.journal.data.get("ending")
        if begun is None:
            self._look_at_limit(one)
        elif not one.has_term:
            self._executor.kill(one.job, hard=False)
            one.has_term = True
        elif Deadline.recorded(begun["until"], otherwise_s=0.0).left_s() <= 0:
            self._executor.kill(one.job, hard=True)
            one.is_over = True

    def _look_at_limit(self, one: Watched) -> None:
        """TERM comes with the next look: what it is for is written down before."""
        deadline = Deadline.recorded(one.journal.data.get("deadline"), otherwise_s=math.inf)
        if deadline.left_s() > 0:
            return
        if self._executor.wait(one.job, timeout_s=0.0) is not None:
            one.is_over = True  # it has ended by itself, and how is found out later
            return
        with self._lock:
            if self._stopping.is_set():
                return
            log.warning("limit_over", job=one.job.name)
            until = Deadline.after(one.grace_s).record()
            one.journal.record(
                ending={"reason": str(Reason.TIMEOUT), "until": until}, term=Moment.now().record()
            )
