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

import structlog
from sqlalchemy import Connection, RootTransaction
from sqlalchemy.exc import DBAPIError

from coordinator.store.dialect import has_lost_transaction, is_locked, set_patience
from coordinator.store.lane_jobs import Job, fail_all, hand_back
from coordinator.store.lane_session import LaneSession
from coordinator.store.prepared import run_plainly

log = structlog.get_logger()

MAX_GROUP = 64
MAX_SHORT_GROUP = 16
CLOSE_S = 30.0
LOCK_PATIENCE_S = 10.0  # of the thread, where another program holds the database; the loop has none


class GroupWriter:
    """Takes jobs from any thread. `connect` opens the connection that only it uses.

    `uses_loop`: False keeps every action in the thread.
    """

    def __init__(self, connect: Callable[[], Connection], *, uses_loop: bool = True) -> None:
        self._connect = connect
        self._uses_loop = uses_loop
        self._session: LaneSession | None = None
        self._waiting: deque[Job] = deque()
        self._turn = threading.Condition()
        self._is_taken = False  # the connection is in use: by the thread, or by the loop below
        self._taken_by: asyncio.AbstractEventLoop | None = None
        self._handed_over: queue.SimpleQueue[Sequence[Job] | None] = queue.SimpleQueue()
        self._transaction: RootTransaction | None = None
        self._patience_s = -1.0  # what the connection was told last
        self._thread = threading.Thread(target=self._work, name="write-lane", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def put(self, job: Job) -> None:
        with self._turn:
            job.is_short = job.is_short and self._uses_loop
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
            group = self._next_group(MAX_SHORT_GROUP) if is_short and self._waiting else []
        try:
            if group and not self._run(group, patience_s=0.0):
                hand_back(group)
                group = []
        except _Locked:
            self._leave_to_thread(group)
            group = []
        finally:
            self._handed_over.put(group)

    def _leave_to_thread(self, group: Sequence[Job]) -> None:
        """Another program holds the database: the thread can wait for it."""
        for job in group:
            job.is_short = False
        with self._turn:
            self._waiting.extendleft(reversed(group))

    # --- in the thread ------------------------------------------------------------------------------

    def _work(self) -> None:
        """Commit what the loop has run, then run and commit what waits, until the loop can go on."""
        while (group := self._handed_over.get()) is not None:
            if group:
                self._commit(group)
                hand_back(group)
            while group := self._next_or_leave():
                if self._run(group, patience_s=LOCK_PATIENCE_S):
                    self._commit(group)
                hand_back(group)
        self._drop()

    def _next_or_leave(self) -> list[Job]:
        with self._turn:
            if not self._waiting:
                self._is_taken = False
                self._turn.notify_all()
                return []
            if all(job.is_short for job in self._waiting) and not _is_gone(self._waiting[0]):
                self._take(self._waiting[0])
                return []
            return self._next_group(MAX_GROUP)

    def _next_group(self, most: int) -> list[Job]:
        """As many as have this weight together, and at least one."""
        group = [self._waiting.popleft()]
        weight = group[0].weight
        while self._waiting and (weight := weight + self._waiting[0].weight) <= most:
            group.append(self._waiting.popleft())
        return group

    # --- the transaction ----------------------------------------------------------------------------

    def _run(self, group: Sequence[Job], *, patience_s: float) -> bool:
        """Run all actions in one transaction and leave it open; False when it was lost.

        _Locked, with nothing run, when somebody else held the database for longer than `patience_s` of 0.
        """
        try:
            session = self._begin(patience_s)
            for job in group:
                _run_in_savepoint(session, job)
                if has_lost_transaction(session.connection()):
                    # the database gave up the whole group: nobody in it may be told it succeeded
                    raise _lost_group(job)
        except _Locked:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, the lane goes on
            self._give_up(group, error)
            return False
        return True

    def _begin(self, patience_s: float) -> LaneSession:
        if self._session is None:
            self._session = LaneSession(self._connect(), shares_transaction=True, is_alone=True)
            self._patience_s = -1.0
        connection = self._session.connection()
        if patience_s != self._patience_s:
            set_patience(connection, patience_s)
            self._patience_s = patience_s
        try:
            self._transaction = connection.begin()
        except DBAPIError as error:
            if patience_s == 0 and is_locked(error):
                self._drop()
                raise _Locked from error
            raise
        return self._session

    def _commit(self, group: Sequence[Job]) -> None:
        try:
            if self._transaction is not None:
                self._transaction.commit()
        except Exception as error:  # noqa: BLE001 - whatever it was, nobody is told of success
            self._give_up(group, error)
        self._transaction = None

    def _give_up(self, group: Sequence[Job], error: Exception) -> None:
        if not isinstance(error, DBAPIError):
            log.exception("write_lane_failed")
        fail_all(group, error)
        try:
            self._drop()
        except Exception:  # a connection that cannot even be closed
            log.exception("connection_not_closed")

    def _drop(self) -> None:
        """The connection starts afresh with the next group."""
        session, self._session, self._transaction = self._session, None, None
        if session is not None:
            session.connection().close()


class _Locked(Exception):
    """Another program holds the database at this moment."""


def _is_gone(job: Job) -> bool:
    """True when nobody can wait for it any more, because the loop that did has closed."""
    return job.loop is None or job.loop.is_closed()


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
