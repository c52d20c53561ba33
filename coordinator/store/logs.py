"""What is known of logs: the order in which their pieces came."""

from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, select
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.store.statements import given
from coordinator.tables import LogAppend, table_of

APPENDS = table_of(LogAppend)

_LAST = select(func.max(APPENDS.c.seq)).where(APPENDS.c.build_id == given(APPENDS.c.build_id))
_INSERT = insert(APPENDS)


def insert_append(tx: Session, step: Any, *, offset: int, length: int, now: datetime) -> None:
    """The next piece of a build's log, from this attempt; the caller holds the build's row."""
    last = tx.connection().execute(_LAST, {"the_build_id": step.build_id})
    tx.connection().execute(
        _INSERT,
        {
            "build_id": step.build_id,
            "seq": (last.scalar_one() or 0) + 1,
            "step_id": step.id,
            "attempt": step.attempt,
            "byte_offset": offset,
            "byte_length": length,
            "at": now,
        },
    )


def list_appends(tx: Session, build_id: str, *, after: int, limit: int) -> list[Row[Any]]:
    statement = (
        select(APPENDS)
        .where(APPENDS.c.build_id == build_id, APPENDS.c.seq > after)
        .order_by(APPENDS.c.seq)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())
