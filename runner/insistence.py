"""How often and how long a request is repeated when the coordinator cannot be reached."""

import random
import threading
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type

from runner.errors import LeaseLost, Unreachable

T = TypeVar("T")
log = structlog.get_logger()

FIRST_S = 0.5
LONGEST_S = 60.0
PATIENCE_S = 24 * 3600.0
LAST_WORDS_S = 5.0
LAST_WORDS_PAUSE_S = 0.5


class GaveUp(Unreachable):
    """The end of this process, or a day of trying."""


class TooLate(GaveUp):
    """A day of trying."""


def insist(
    send: Callable[[], T],
    *,
    given_up: threading.Event,
    stopping: threading.Event | None = None,
    patience_s: float = PATIENCE_S,
    longest_s: float = LONGEST_S,
    last_words_s: float = 0.0,
) -> T:
    """Repeat `send` until it is answered, with growing, jittered pauses.

    Raises LeaseLost as soon as `given_up` is set, GaveUp `last_words_s` after `stopping` was seen to be set,
    and TooLate after `patience_s`; there is always one try. A pause ends early when the coordinator is back.
    """
    ends_at: float | None = None
    is_back: Callable[[], bool] | None = None

    def pause(state: RetryCallState) -> float:
        nonlocal is_back
        error = state.outcome.exception() if state.outcome else None
        is_back = error.is_back if isinstance(error, Unreachable) else None
        return pause_after(state, longest_s=longest_s)

    def is_stopping() -> bool:
        return stopping is not None and stopping.is_set()

    def sleep(seconds: float) -> None:
        deadline = time.monotonic() + (min(seconds, LAST_WORDS_PAUSE_S) if is_stopping() else seconds)
        was_stopping = is_stopping()
        while time.monotonic() < deadline and not given_up.is_set():
            if (is_stopping() and not was_stopping) or (is_back is not None and is_back()):
                return
            given_up.wait(min(0.5, max(0.0, deadline - time.monotonic())))

    def stop(state: RetryCallState) -> bool:
        nonlocal ends_at
        if is_stopping():
            ends_at = ends_at if ends_at is not None else time.monotonic() + last_words_s
            return time.monotonic() >= ends_at
        return time.monotonic() - state.start_time > patience_s

    def give_up(state: RetryCallState) -> NoReturn:
        error = state.outcome.exception() if state.outcome else None
        raise (GaveUp if is_stopping() else TooLate)(f"given up: {error}") from error

    def before(_state: RetryCallState) -> None:
        if given_up.is_set():
            raise LeaseLost("the attempt was abandoned")

    retrying = Retrying(
        retry=retry_if_exception_type(Unreachable),
        wait=pause,
        stop=stop,
        sleep=sleep,
        before=before,
        before_sleep=_tell,
        retry_error_callback=give_up,
    )
    return retrying(send)


def pause_after(state: RetryCallState, *, longest_s: float = LONGEST_S) -> float:
    """Full jitter over a doubling window, and never less than the coordinator asks for."""
    window = min(longest_s, FIRST_S * 2.0 ** min(state.attempt_number, 12))
    error = state.outcome.exception() if state.outcome else None
    wished = error.retry_after_s if isinstance(error, Unreachable) and error.retry_after_s else 0.0
    return max(random.uniform(0, window), wished)  # noqa: S311 - jitter, not a secret


def _tell(state: RetryCallState) -> None:
    if state.attempt_number in (1, 5) or state.attempt_number % 20 == 0:
        error = state.outcome.exception() if state.outcome else None
        log.warning("coordinator_unreachable", tries=state.attempt_number, cause=str(error))
