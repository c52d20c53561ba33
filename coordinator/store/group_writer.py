"""The one writer of SQLite: whatever waits together is committed together.

Short actions run in the event loop itself while the connection is free: to hand each to another thread, and
to take turns with it, costs several times what the action takes. All others, and every COMMIT, which waits
for the disk, have the writer's own thread.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence

from sqlalchemy import Connection, RootTransaction
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from coordinator.store.dialect import has_lost_transaction
from coordinator.store.lane_jobs import Job, fail_all, hand_back
from coordinator.store.lane_session import LaneSession
from coordinator.store.prepared import run_plainly

MAX_GROUP = 64
MAX_SHORT_GROUP = 16
CLOSE_S = 30.0


class GroupWriter:
    """Takes jobs from any thread. `connect` opens the connection that only it uses."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._session: LaneSession | None = None
        self._waiting: deque[Job] = deque()
        self._turn = threading.Condition()
        self._is_taken = False  # the connection is in use: by the thread, or by the loop below
        self._taken_by: asyncio.AbstractEventLoop | None = None
        self._handed_over: queue.SimpleQueue[Sequence[Job] | None] = queue.SimpleQueue()
        self._transaction: RootTransaction | None = None
        self._thread = threading.Thread(target=self._work, name="write-lane", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def put(self, job: Job) -> None:
        with self._turn:
            self._waiting.append(job)
            if self._is_taken and not (self._taken_by and self._taken_by.is_closed()):
                return  # who has the connection takes care of this one next
            self._take(job)

    def close(self) -> None:
        """Finish what has been handed in, then stop."""
        with self._turn:
            self._turn.wait_for(lambda: not self._is_taken and not self._waiting, CLOSE_S)
        self._handed_over.put(None)
        self._thread.join(CLOSE_S)

    def _take(self, job: Job) -> None:
        """Give the connection to the loop where the job waits, or to the thread; the turn is held."""
        self._is_taken = True
        self._taken_by = job.loop if job.is_short else None
        if self._taken_by is None:
            self._handed_over.put(())
            return
        try:
            self._taken_by.call_soon_threadsafe(self._run_short_ones)
        except RuntimeError:  # that loop has closed
            self._taken_by = None
            self._handed_over.put(())

    # --- in the event loop --------------------------------------------------------------------------

    def _run_short_ones(self) -> None:
        """Run what is short and let the thread commit it; leave it all to the thread if something is not."""
        with self._turn:
            self._taken_by = None
            is_short = all(job.is_short for job in self._waiting)
            group = self._next_group(MAX_SHORT_GROUP) if is_short else []
        if group and not self._run(group):
            hand_back(group)
            group = []
        self._handed_over.put(group)

    # --- in the thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        """Commit what the loop has run, then run and commit what waits, until the loop can go on."""
        while (group := self._handed_over.get()) is not None:
            if group:
                self._commit(group)
                hand_back(group)
            while group := self._next_or_leave():
                if self._run(group):
                    self._commit(group)
                hand_back(group)
        self._drop()

    def _next_or_leave(self) -> list[Job]:
        with self._turn:
            if not self._waiting:
                self._is_taken = False
                self._turn.notify_all()
                return []
            if all(job.is_short for job in self._waiting):
                self._take(self._waiting[0])
                return []
            return self._next_group(MAX_GROUP)

    def _next_group(self, most: int) -> list[Job]:
        return [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]

    # --- the transaction ----------------------------------------------------------------------------

    def _run(self, group: Sequence[Job]) -> bool:
        """Run all actions in one transaction and leave it open; False when it was lost."""
        try:
            if self._session is None:
                self._session = LaneSession(self._connect(), shares_transaction=True, is_alone=True)
            self._transaction = self._session.connection().begin()
            for job in group:
                _run_in_savepoint(self._session, job)
                if has_lost_transaction(self._session.connection()):
                    # the database gave up the whole group: nobody in it may be told it succeeded
                    raise _lost_group(job)
        except SQLAlchemyError as error:  # also what the library itself finds broken: the lane goes on
            fail_all(group, error)
            self._drop()
            return False
        return True

    def _commit(self, group: Sequence[Job]) -> None:
        try:
            if self._transaction is not None:
                self._transaction.commit()
        except SQLAlchemyError as error:
            fail_all(group, error)
            self._drop()
        self._transaction = None

    def _drop(self) -> None:
        """The connection starts afresh with the next group."""
        session, self._session, self._transaction = self._session, None, None
        if session is not None:
            session.connection().close()


def _run_in_savepoint(session: LaneSession, job: Job) -> None:
    run_plainly(session, "SAVEPOINT action")
    try:
        job.result = job.action(session)
        session.keep()
    except Exception as error:  # noqa: BLE001 - handed to the caller of this action, whatever it is
        job.error = error
        if not has_lost_transaction(session.connection()):
            session.forget()
            run_plainly(session, "ROLLBACK TO action")
    if not has_lost_transaction(session.connection()):
        run_plainly(session, "RELEASE action")


def _lost_group(job: Job) -> DBAPIError:
    if isinstance(job.error, DBAPIError):
        return job.error
    return DBAPIError("COMMIT", None, RuntimeError("the transaction was lost"))
