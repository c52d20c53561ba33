"""Runners, known by the digest of their secret."""

import functools
from datetime import datetime
from typing import Any

from sqlalchemy import select as core_select
from sqlalchemy import update
from sqlalchemy.engine import Row
from sqlmodel import Session, col, or_, select

from coordinator.store.lane_session import needs_locks
from coordinator.store.prepared import Found, Prepared
from coordinator.store.statements import as_new, given, new_values
from coordinator.tables import Runner, table_of

RUNNERS = table_of(Runner)

_FIND = Prepared(core_select(RUNNERS).where(RUNNERS.c.id == given(RUNNERS.c.id)))
_LOCK = Prepared(core_select(RUNNERS.c.id).where(RUNNERS.c.id == given(RUNNERS.c.id)).with_for_update())


def insert_runner(tx: Session, runner: Runner) -> None:
    tx.add(runner)
    tx.flush()


def find_runner_by_secret(tx: Session, secret_hash: bytes) -> Row[Any] | None:
    """The runner with this secret, unless it was revoked."""
    statement = core_select(RUNNERS).where(
        RUNNERS.c.secret_hash == secret_hash, RUNNERS.c.revoked_at.is_(None)
    )
    return tx.connection().execute(statement).one_or_none()


def find_runner(tx: Session, runner_id: str) -> Found | None:
    return _FIND.first(tx, {"the_id": runner_id})


def lock_runner(tx: Session, runner_id: str) -> None:
    """Hold the runner until the transaction ends: what it asks twice at once is answered in turn."""
    if needs_locks(tx):
        _LOCK.first(tx, {"the_id": runner_id})


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
