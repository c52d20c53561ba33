"""The answers to creations that named an idempotency key. A key belongs to one principal."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, and_, delete, select, tuple_, update
from sqlmodel import Session

from coordinator.access_tables import KeptAnswer
from coordinator.errors import Unavailable
from coordinator.store.dialect import insert_or_change
from coordinator.tables import table_of

KEPT = table_of(KeptAnswer)
AT_ONCE = 500
_NOT_YET = 0


@dataclass(frozen=True)
class Asked:
    """A request that is to be answered once: who sent it, under which key, and the digest of what it says."""

    principal: str
    key: str
    request_sha256: str


@dataclass(frozen=True)
class Kept:
    """What was answered, and to which request."""

    request_sha256: str
    status: int
    body: str


def claim(tx: Session, asked: Asked, *, now: datetime, life: timedelta) -> Kept | None:
    """What this key has been answered already; with None it is ours, and `keep` follows in this transaction.

    Who asks at the same time waits here until this transaction has ended.
    """
    row = {"request_sha256": asked.request_sha256, "status": _NOT_YET, "body": "", "expires_at": now + life}
    place = {"principal": asked.principal, "key": asked.key}
    if insert_or_change(tx, KEPT, {**place, **row}, row, only_if=KEPT.c.expires_at <= now):
        return None
    found = tx.connection().execute(select(KEPT).where(_is(asked))).one_or_none()
    if found is None:
        raise Unavailable("the answer kept under this key has just expired; try again")
    return Kept(found.request_sha256, found.status, found.body)


def keep(tx: Session, asked: Asked, status: int, body: str) -> None:
    """What the claimed key is answered from now on."""
    tx.connection().execute(update(KEPT).where(_is(asked)).values(status=status, body=body))


def drop(tx: Session, asked: Asked) -> None:
    """The claimed key is free again."""
    tx.connection().execute(delete(KEPT).where(_is(asked)))


def delete_old_answers(tx: Session, *, now: datetime, at_once: int = AT_ONCE) -> int:
    """Delete some answers that need not be kept any longer; returns how many."""
    has_expired = KEPT.c.expires_at <= now
    some = select(KEPT.c.principal, KEPT.c.key).where(has_expired).order_by(KEPT.c.expires_at).limit(at_once)
    place = tuple_(KEPT.c.principal, KEPT.c.key)
    # asked again of each row: the key may have been claimed anew meanwhile
    return tx.connection().execute(delete(KEPT).where(place.in_(some), has_expired)).rowcount


def _is(asked: Asked) -> ColumnElement[bool]:
    return and_(KEPT.c.principal == asked.principal, KEPT.c.key == asked.key)
