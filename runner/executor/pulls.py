"""One pull per image at a time, however many steps wait for it; each waits with a deadline of its own.

What nobody waits for any more is broken off at its next sign of life.
"""

import contextlib
import random
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Final

from runner.errors import EngineUnavailable, StepError
from runner.executor import verdict
from shared.reasons import Reason

TRIES: Final = 3
PAUSE_S: Final = 2.0
LINE_EVERY_S: Final = 1.0


class PullFailed(Exception):
    """The registry or the engine refused; the text is theirs."""


@dataclass
class _Flight:
    """A pull under way: its latest line and, at the end, what went wrong."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    waiting: int = 0  # so many want it; under the lock of all pulls
    line: str = ""
    is_over: bool = False
    failure: StepError | EngineUnavailable | None = None


class Pulls:
    """Pulls images by `pull_once`, which yields lines of progress and raises PullFailed."""

    def __init__(
        self, pull_once: Callable[[str], Generator[str, None, None]], *, pause_s: float = PAUSE_S
    ) -> None:
        self._pull_once = pull_once
        self._pause_s = pause_s
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}

    def pull(self, image: str, *, deadline_s: float, progress: Callable[[str], None]) -> None:
        """Return when the image is here; the pull goes on for others when this deadline passes.

        What `progress` raises ends the waiting too.
        """
        flight = self._join(image)
        try:
            self._await(image, flight, deadline_s, progress)
        finally:
            with self._lock:
                flight.waiting -= 1

    def _await(self, image: str, flight: _Flight, deadline_s: float, progress: Callable[[str], None]) -> None:
        until = time.monotonic() + deadline_s
        told_at, told = 0.0, ""
        while True:
            with flight.changed:
                flight.changed.wait_for(
                    lambda: flight.is_over, min(LINE_EVERY_S, max(0.0, until - time.monotonic()))
                )
                is_over, line, failure = flight.is_over, flight.line, flight.failure
            now = time.monotonic()
            if line != told and (now - told_at >= LINE_EVERY_S or is_over):
                progress(line)
                told_at, told = now, line
            if failure is not None:
                raise failure
            if is_over:
                return
            if now >= until:
                raise StepError(Reason.PULL_TIMEOUT, f"{image} did not arrive within {deadline_s:g} s")

    def _join(self, image: str) -> _Flight:
        with self._lock:
            flight = self._flights.get(image)
            if flight is None:
                flight = self._flights[image] = _Flight()
                threading.Thread(target=self._fly, args=(image, flight), name="pull", daemon=True).start()
            flight.waiting += 1
            return flight

    def _is_unwanted(self, image: str, flight: _Flight) -> bool:
        """True when nobody waits for it; from then on nobody can join it."""
        with self._lock:
            if flight.waiting == 0:
                self._leave(image, flight)
                return True
            return False

    def _leave(self, image: str, flight: _Flight) -> None:
        if self._flights.get(image) is flight:
            del self._flights[image]

    def _fly(self, image: str, flight: _Flight) -> None:
        failure: StepError | EngineUnavailable | None = None
        try:
            self._try_often(image, flight)
        except (StepError, EngineUnavailable) as error:
            failure = error
        except Exception as error:
            failure = StepError(Reason.INTERNAL, f"pulling {image} failed in an unknown way: {error!r}")
            raise
        finally:
            with self._lock:
                self._leave(image, flight)
            with flight.changed:
                flight.failure, flight.is_over = failure, True
                flight.changed.notify_all()

    def _try_often(self, image: str, flight: _Flight) -> None:
        for attempt in range(1, TRIES + 1):
            try:
                self._follow(image, flight)
            except PullFailed as error:
                text = str(error)
                if attempt == TRIES or not verdict.may_pull_again(text):
                    raise StepError(verdict.explain_pull(text), f"{image}: {text}") from error
                self._tell(flight, f"{image}: {text}; trying again")
                time.sleep(self._pause_s * attempt * random.uniform(0.5, 1.5))  # noqa: S311
            else:
                return

    def _follow(self, image: str, flight: _Flight) -> None:
        """Each who waits has a deadline, so that this one has an end as well."""
        with contextlib.closing(self._pull_once(image)) as lines:
            for line in lines:
                self._tell(flight, line)
                if self._is_unwanted(image, flight):
                    return

    def _tell(self, flight: _Flight, line: str) -> None:
        with flight.changed:
            flight.line = line
