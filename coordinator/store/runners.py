"""Runners, known by the digest of their secret."""

import functools
from datetime import datetime
from typing import Any

from sqlalchemy import func, update
from sqlalchemy import select as core_select
from sqlalchemy.engine import Row
from sqlmodel import Session, col, or_, select

from coordinator.errors import Foreign, NotFound, Revoked
from coordinator.rules.access import Caller
from coordinator.store.lane_session import needs_locks
from coordinator.store.prepared import Found, Prepared
from coordinator.store.statements import as_new, given, new_values
from coordinator.tables import Runner, table_of

RUNNERS = table_of(Runner)

_FIND = Prepared(core_select(RUNNERS).where(RUNNERS.c.id == given(RUNNERS.c.id)))
_LOCK = Prepared(
    core_select(RUNNERS.c.id)
    .where(RUNNERS.c.id == given(RUNNERS.c.id), RUNNERS.c.revoked_at.is_(None))
    .with_for_update()
)


def insert_runner(tx: Session, runner: Runner) -> None:
    tx.add(runner)
    tx.flush()


def find_runner_by_secret(tx: Session, secret_hash: bytes) -> Row[Any] | None:
    """The runner with this secret, or with this one until it uses the next; also one that was revoked."""
    statement = core_select(RUNNERS).where(
        or_(RUNNERS.c.secret_hash == secret_hash, RUNNERS.c.former_secret_hash == secret_hash)
    )
    return tx.connection().execute(statement).first()


def find_runner(tx: Session, runner_id: str) -> Found | None:
    return _FIND.first(tx, {"the_id": runner_id})


def lock_runner(tx: Session, runner_id: str) -> None:
    """Hold the runner until the transaction ends: what it asks twice at once is answered in turn.

    Revoked for one that was revoked while its row was waited for.
    """
    if needs_locks(tx) and _LOCK.first(tx, {"the_id": runner_id}) is None:
        raise Revoked("this runner was revoked")


def get_runner(tx: Session, caller: Caller, runner_id: str) -> Runner:
    """The runner, if the caller administers it; a shared one is the operator's alone."""
    runner = tx.get(Runner, runner_id)
    if runner is None or runner.revoked_at is not None:
        raise NotFound("no such runner")
    if not caller.may_administer(runner.tenant_id):
        raise Foreign("no such runner")
    if runner.tenant_id is not None:
        caller.require_in(runner.tenant_id)
    return runner


def revoke_runner(tx: Session, runner_id: str, *, now: datetime) -> bool:
    """False when somebody else has just done so."""
    statement = update(RUNNERS).where(RUNNERS.c.id == runner_id, RUNNERS.c.revoked_at.is_(None))
    changed = tx.connection().execute(statement.values(revoked_at=now, session=None, slots=0))
    return changed.rowcount == 1


def request_rotation(tx: Session, runner_id: str, *, now: datetime) -> None:
    """Ask for a new secret; who is asked already stays asked since then."""
    statement = update(RUNNERS).where(
        RUNNERS.c.id == runner_id, RUNNERS.c.revoked_at.is_(None), RUNNERS.c.rotate_requested_at.is_(None)
    )
    tx.connection().execute(statement.values(rotate_requested_at=now))


def begin_rotation(tx: Session, runner_id: str, secret_hash: bytes) -> bool:
    """The next secret counts, and the present one until the next is used; False where none was asked for."""
    statement = update(RUNNERS).where(
        RUNNERS.c.id == runner_id, RUNNERS.c.revoked_at.is_(None), RUNNERS.c.rotate_requested_at.is_not(None)
    )
    former = func.coalesce(RUNNERS.c.former_secret_hash, RUNNERS.c.secret_hash)
    changed = tx.connection().execute(statement.values(former_secret_hash=former, secret_hash=secret_hash))
    return changed.rowcount == 1


def end_rotation(tx: Session, runner_id: str, secret_hash: bytes) -> bool:
    """The former secret counts no more, as this one is in use; False when that was known before."""
    statement = update(RUNNERS).where(
        RUNNERS.c.id == runner_id,
        RUNNERS.c.secret_hash == secret_hash,
        RUNNERS.c.former_secret_hash.is_not(None),
    )
    changed = tx.connection().execute(statement.values(former_secret_hash=None, rotate_requested_at=None))
    return changed.rowcount == 1


def list_runners(tx: Session, tenant_id: str | None) -> list[Runner]:
    """Those that were not revoked, of all tenants or of one and the shared ones."""
    statement = select(Runner).where(col(Runner.revoked_at).is_(None)).order_by(col(Runner.id))
    if tenant_id is not None:
        statement = statement.where(or_(col(Runner.tenant_id) == tenant_id, col(Runner.tenant_id).is_(None)))
    return list(tx.exec(statement).all())


def change_runner(tx: Session, runner_id: str, *, now: datetime, **values: Any) -> None:
    values = {"last_seen_at": now, **values}
    _change(tuple(values)).run(tx, {"the_id": runner_id} | as_new(values))


@functools.cache
def _change(names: tuple[str, ...]) -> Prepared:
    changing = update(RUNNERS).where(RUNNERS.c.id == given(RUNNERS.c.id))
    return Prepared(changing.values(new_values(RUNNERS, names)))
