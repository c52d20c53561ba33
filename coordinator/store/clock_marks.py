"""Where the coordinators' clocks stood: one row for each boot of a machine that one of them ran on."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, select, update
from sqlmodel import Session

from coordinator.store.dialect import insert_if_absent
from coordinator.tables import ClockMark, table_of

MARKS = table_of(ClockMark)
_LIFE = timedelta(days=30)


def find_mark(tx: Session, boot_id: str) -> Any:
    """The mark of this boot, or None."""
    return tx.connection().execute(select(MARKS).where(MARKS.c.boot_id == boot_id)).one_or_none()


def find_latest(tx: Session) -> datetime | None:
    """The latest moment that any clock has shown."""
    latest: datetime | None = tx.connection().execute(select(func.max(MARKS.c.at))).scalar_one()
    return latest


def write_mark(tx: Session, boot_id: str, passed_ns: int, at: datetime) -> None:
    """From now on this is the mark of this boot; the first one of a boot removes those of long ago."""
    mark = {"passed_ns": passed_ns, "at": at}
    changed = tx.connection().execute(update(MARKS).where(MARKS.c.boot_id == boot_id).values(mark))
    if changed.rowcount == 1:
        return
    insert_if_absent(tx, MARKS, {"boot_id": boot_id, **mark})
    tx.connection().execute(delete(MARKS).where(MARKS.c.at < at - _LIFE))
