"""How transactions run: one writing lane with group commit on SQLite, several lanes on Postgres.

An action runs in a lane's thread with its own savepoint or transaction; what it returns is handed back
only after the commit. Nothing that was answered is lost when the process dies right after.
"""

import asyncio
import queue
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlmodel import Session

from coordinator.errors import CoordinatorError, Invalid, Unavailable
from coordinator.store.dialect import (
    Database,
    has_lost_transaction,
    is_bad_text,
    is_outage,
    may_be_retried,
)
from coordinator.store.lane_session import LaneSession

T = TypeVar("T")
Action = Callable[[Session], Any]
log = structlog.get_logger()

MAX_BATCH = 64
MAX_TRIES = 6
MAX_WAITING = 20_000


@dataclass(slots=True)
class _Job:
    action: Action
    done: Callable[[Any, BaseException | None], None]
    loop: asyncio.AbstractEventLoop | None
    result: Any = None
    error: BaseException | None = None


class Lanes:
    """The ways into the database. `write` and `read` answer after the commit."""

    def __init__(self, database: Database, *, writers: int = 4, readers: int = 2) -> None:
        self.database = database
        self._writes: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._reads = self._writes if database.shares_one_connection else queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._closed = False
        if database.is_sqlite:
            self._spawn("write", self._write_in_groups, 1)
        else:
            self._spawn("write", lambda: self._run_singly(self._writes, database.writer.connect), writers)
        if not database.shares_one_connection:
            self._spawn("read", lambda: self._run_singly(self._reads, database.reader.connect), readers)

    async def write(self, action: Callable[[Session], T]) -> T:
        """Run `action` in a transaction; its answer comes after the commit."""
        return await self._send(self._writes, action)

    async def read(self, action: Callable[[Session], T]) -> T:
        """Run `action` on a snapshot; it must not change anything."""
        return await self._send(self._reads, action)

    def write_and_wait(self, action: Callable[[Session], T], *, timeout_s: float = 60.0) -> T:
        """`write` for callers that are not in an event loop."""
        ready = threading.Event()
        outcome: list[Any] = [None, None]

        def done(result: Any, error: BaseException | None) -> None:
            outcome[:] = [result, error]
            ready.set()

        self._put(self._writes, _Job(action, done, None))
        if not ready.wait(timeout_s):
            raise Unavailable("the database did not answer in time")
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    @property
    def waiting(self) -> dict[str, int]:
        """How many transactions of each kind have not begun yet."""
        return {"read": self._reads.qsize(), "write": self._writes.qsize()}

    def close(self) -> None:
        """Finish what has been handed in, then stop the threads."""
        self._closed = True
        for _ in self._threads:
            self._writes.put(None)
            if self._reads is not self._writes:
                self._reads.put(None)
        for thread in self._threads:
            thread.join(timeout=30)

    def _spawn(self, name: str, target: Callable[[], None], count: int) -> None:
        for number in range(count):
            thread = threading.Thread(target=target, name=f"{name}-lane-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)

    async def _send(self, lane: "queue.SimpleQueue[_Job | None]", action: Callable[[Session], T]) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def done(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._put(lane, _Job(action, done, loop))
        return await future

    def _put(self, lane: "queue.SimpleQueue[_Job | None]", job: _Job) -> None:
        if self._closed:
            raise Unavailable("the coordinator is stopping")
        if lane.qsize() > MAX_WAITING:
            raise Unavailable("too many requests are waiting for the database")
        lane.put(job)

    def _new_session(self, connect: Callable[[], Connection]) -> LaneSession:
        is_sqlite = self.database.is_sqlite
        return LaneSession(connect(), shares_transaction=is_sqlite, is_alone=is_sqlite)

    # --- SQLite: one writer, one COMMIT for all that wait -------------------------------------------

    def _write_in_groups(self) -> None:
        session: LaneSession | None = None
        while True:
            batch = self._next_batch()
            if batch is None:
                break
            try:
                session = session or self._new_session(self.database.writer.connect)
                self._commit_group(session, batch)
            except SQLAlchemyError as error:  # also what the library itself finds broken: the lane goes on
                _fail_all(batch, error)
                _drop(session)
                session = None
            _hand_back(batch)
        _drop(session)

    def _next_batch(self) -> list[_Job] | None:
        first = self._writes.get()
        if first is None:
            return None
        batch = [first]
        while len(batch) < MAX_BATCH:
            try:
                job = self._writes.get_nowait()
            except queue.Empty:
                break
            if job is None:
                self._writes.put(None)
                break
            batch.append(job)
        return batch

    def _commit_group(self, session: LaneSession, batch: list[_Job]) -> None:
        connection = session.connection()
        with connection.begin():
            for job in batch:
                _run_in_savepoint(session, job)
                if has_lost_transaction(connection):
                    # SQLite gave up the whole group: nobody in it may be told it succeeded
                    raise _lost_group(job)

    # --- Postgres, and readers: one transaction a job -----------------------------------------------

    def _run_singly(self, lane: "queue.SimpleQueue[_Job | None]", connect: Callable[[], Connection]) -> None:
        session: LaneSession | None = None
        while (job := lane.get()) is not None:
            for attempt in range(MAX_TRIES):
                try:
                    session = session or self._new_session(connect)
                    with session.connection().begin():
                        job.error = None
                        _run_plainly(session, job)
                    break
                except DBAPIError as error:
                    job.error = error
                    if is_outage(error) and not may_be_retried(error):
                        _drop(session)
                        session = None
                        break
                    if not may_be_retried(error):
                        break
                    time.sleep(random.uniform(0.001, 0.02) * 2**attempt)  # noqa: S311 - jitter, not a secret
                except _Refusal:
                    break
                except SQLAlchemyError as error:  # a broken pool or connection: a fresh one for the next job
                    job.error = _lost(error)
                    _drop(session)
                    session = None
                    break
            _hand_back([job])
        _drop(session)


class _Refusal(Exception):
    """The action said no: roll back and hand its own error to the caller."""


def _run_in_savepoint(session: LaneSession, job: _Job) -> None:
    connection = session.connection()
    connection.exec_driver_sql("SAVEPOINT action")
    try:
        job.result = job.action(session)
        session.keep()
    except Exception as error:  # noqa: BLE001 - handed to the caller of this action, whatever it is
        job.error = error
        if not has_lost_transaction(connection):
            session.forget()
            connection.exec_driver_sql("ROLLBACK TO action")
    if not has_lost_transaction(connection):
        connection.exec_driver_sql("RELEASE action")


def _run_plainly(session: LaneSession, job: _Job) -> None:
    try:
        job.result = job.action(session)
        session.keep()
    except DBAPIError:
        session.forget()
        raise
    except Exception as error:
        session.forget()
        job.error = error
        raise _Refusal from error


def _lost_group(job: _Job) -> DBAPIError:
    if isinstance(job.error, DBAPIError):
        return job.error
    return DBAPIError("COMMIT", None, RuntimeError("the transaction was lost"))


def _lost(error: SQLAlchemyError) -> Unavailable:
    log.error("database_lane_failed", cause=str(error))
    return Unavailable("the database could not answer; try again")


def _fail_all(batch: list[_Job], error: SQLAlchemyError) -> None:
    cause = error.orig if isinstance(error, DBAPIError) else error
    log.error("database_group_failed", size=len(batch), cause=str(cause))
    for job in batch:
        if not isinstance(job.error, CoordinatorError):
            job.error = Unavailable("the database could not commit; try again")


def _drop(session: LaneSession | None) -> None:
    if session is not None:
        session.connection().close()


def _hand_back(batch: list[_Job]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
    for job in batch:
        job.error = _speakable(job.error)
        if job.loop is None:
            job.done(job.result, job.error)
        else:
            loops.setdefault(job.loop, []).append(job)
    for loop, jobs in loops.items():
        try:
            loop.call_soon_threadsafe(_finish, jobs)
        except RuntimeError:
            log.info("caller_gone", jobs=len(jobs))  # its event loop has closed; the commit stands


def _finish(jobs: list[_Job]) -> None:
    for job in jobs:
        job.done(job.result, job.error)


def _speakable(error: BaseException | None) -> BaseException | None:
    if not isinstance(error, DBAPIError):
        return error
    if is_bad_text(error):
        return Invalid("a value cannot be stored")
    if is_outage(error) or may_be_retried(error):
        log.error("database_unavailable", cause=str(error.orig))
        return Unavailable("the database cannot answer now; try again")
    return error
