"""How transactions run: one writer with group commit on SQLite, several lanes on Postgres.

An action runs with its own savepoint or transaction; what it returns is handed back only after the commit.
Nothing that was answered is lost when the process dies right after.
"""

import asyncio
import queue
import random
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlmodel import Session

from coordinator.errors import Unavailable
from coordinator.store.dialect import Database, is_outage, may_be_retried
from coordinator.store.group_writer import GroupWriter
from coordinator.store.lane_jobs import Job, Refusal, hand_back, run_action
from coordinator.store.lane_session import LaneSession

T = TypeVar("T")
log = structlog.get_logger()

MAX_TRIES = 6
MAX_WAITING = 20_000
CLOSE_S = 30.0


class Lanes:
    """The ways into the database. `write` and `read` answer after the commit."""

    def __init__(self, database: Database, *, writers: int = 4, readers: int = 2) -> None:
        self.database = database
        self._closed = False
        self._writes: GroupWriter | _SingleLanes = (
            GroupWriter(database.writer.connect, uses_loop=not database.shares_one_connection)
            if database.is_sqlite
            else _SingleLanes("write", database.writer.connect, writers)
        )
        self._reads = (
            self._writes
            if database.shares_one_connection
            else _SingleLanes("read", database.reader.connect, readers, is_sqlite=database.is_sqlite)
        )

    async def write(self, action: Callable[[Session], T], *, weight: int = 1) -> T:
        """Run `action` in a transaction; its answer comes after the commit.

        `weight` is how many usual actions it takes as long as.
        """
        return await self._send(self._writes, action, weight=weight)

    async def write_shortly(self, action: Callable[[Session], T]) -> T:
        """`write` for what takes a few statements, no file and no time: it may run in the event loop."""
        return await self._send(self._writes, action, is_short=True)

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

        self._put(self._writes, Job(action, done, None))
        if not ready.wait(timeout_s):
            raise Unavailable("the database did not answer in time")
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    @property
    def waiting(self) -> dict[str, int]:
        """How many transactions of each kind have not begun yet."""
        return {"read": self._reads.depth, "write": self._writes.depth}

    def close(self) -> None:
        """Finish what has been handed in, then stop the threads."""
        self._closed = True
        self._writes.close()
        if self._reads is not self._writes:
            self._reads.close()

    async def _send(
        self,
        lane: "GroupWriter | _SingleLanes",
        action: Callable[[Session], T],
        *,
        is_short: bool = False,
        weight: int = 1,
    ) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def done(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        self._put(lane, Job(action, done, loop, is_short, weight))
        return await future

    def _put(self, lane: "GroupWriter | _SingleLanes", job: Job) -> None:
        if self._closed:
            raise Unavailable("the coordinator is stopping")
        if lane.depth > MAX_WAITING:
            raise Unavailable("too many requests are waiting for the database")
        lane.put(job)


class _SingleLanes:
    """Threads with a connection each, and a transaction for every job."""

    def __init__(
        self, name: str, connect: Callable[[], Connection], count: int, *, is_sqlite: bool = False
    ) -> None:
        self._connect = connect
        self._is_sqlite = is_sqlite
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-lane-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def depth(self) -> int:
        """How many wait."""
        return self._jobs.qsize()

    def put(self, job: Job) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join(CLOSE_S)

    def _new_session(self) -> LaneSession:
        return LaneSession(self._connect(), shares_transaction=self._is_sqlite, is_alone=self._is_sqlite)

    def _work(self) -> None:
        session: LaneSession | None = None
        while (job := self._jobs.get()) is not None:
            for attempt in range(MAX_TRIES):
                try:
                    session = session or self._new_session()
                    with session.connection().begin():
                        job.error = None
                        run_action(session, job)
                    break
                except DBAPIError as error:
                    job.error = error
                    if is_outage(error) and not may_be_retried(error):
                        _throw_away(session)
                        session = None
                        break
                    if not may_be_retried(error):
                        break
                    time.sleep(random.uniform(0.001, 0.02) * 2**attempt)  # noqa: S311 - jitter, not a secret
                except Refusal:
                    break
                except SQLAlchemyError as error:  # a broken pool or connection: a fresh one for the next job
                    job.error = _lost(error)
                    _drop(session)
                    session = None
                    break
            hand_back([job])
        _drop(session)


def _lost(error: SQLAlchemyError) -> Unavailable:
    log.error("database_lane_failed", cause=str(error))
    return Unavailable("the database could not answer; try again")


def _throw_away(session: LaneSession | None) -> None:
    """The server behind this connection is gone, or serves readers only: a new one finds its successor."""
    if session is not None:
        session.connection().invalidate()
    _drop(session)


def _drop(session: LaneSession | None) -> None:
    if session is not None:
        session.connection().close()
