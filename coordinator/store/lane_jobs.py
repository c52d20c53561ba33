"""One action on its way through a lane: how it is run, and how its answer gets back to who waits for it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from coordinator.errors import CoordinatorError, Invalid, Unavailable
from coordinator.store.dialect import is_bad_text, is_outage, may_be_retried
from coordinator.store.lane_session import LaneSession

Action = Callable[[Session], Any]
log = structlog.get_logger()


@dataclass(slots=True)
class Job:
    """An action, who hears of its end, and what that was.

    `is_short`: over in a moment, without files. `weight`: how many usual actions it takes as long as.
    """

    action: Action
    done: Callable[[Any, BaseException | None], None]
    loop: asyncio.AbstractEventLoop | None
    is_short: bool = False
    weight: int = 1
    result: Any = None
    error: BaseException | None = None


class Refusal(Exception):
    """The action said no: roll back and hand its own error to the caller."""


def run_action(session: LaneSession, job: Job) -> None:
    """Run it in a transaction of its own; Refusal when that has to be rolled back."""
    try:
        job.result = job.action(session)
        session.keep()
    except DBAPIError:
        session.forget()
        raise
    except Exception as error:
        session.forget()
        job.error = error
        raise Refusal from error


def fail_all(jobs: Sequence[Job], error: Exception) -> None:
    """None of them is stored; who was refused by its own action hears that."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    log.error("database_group_failed", size=len(jobs), cause=str(cause))
    for job in jobs:
        if not isinstance(job.error, CoordinatorError):
            job.error = Unavailable("the database could not commit; try again")


def hand_back(jobs: Sequence[Job]) -> None:
    """Tell everyone who waits how it ended, each in the thread where it waits."""
    loops: dict[asyncio.AbstractEventLoop, list[Job]] = {}
    for job in jobs:
        job.error = speakable(job.error)
        if job.loop is None:
            job.done(job.result, job.error)
        else:
            loops.setdefault(job.loop, []).append(job)
    for loop, of_loop in loops.items():
        try:
            loop.call_soon_threadsafe(_finish, of_loop)
        except RuntimeError:
            log.info("caller_gone", jobs=len(of_loop))  # its event loop has closed; the commit stands


def _finish(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.done(job.result, job.error)


def speakable(error: BaseException | None) -> BaseException | None:
    """What a caller may hear of an error of the database."""
    if not isinstance(error, DBAPIError):
        return error
    if is_bad_text(error):
        return Invalid("a value cannot be stored")
    if is_outage(error) or may_be_retried(error):
        log.error("database_unavailable", cause=str(error.orig))
        return Unavailable("the database cannot answer now; try again")
    return error
