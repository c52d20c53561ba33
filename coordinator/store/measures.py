"""Counts for the metrics: each reads a bounded part of one index, however many rows there are."""

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.tables import Build, Runner, Step, table_of

BUILDS = table_of(Build)
STEPS = table_of(Step)
RUNNERS = table_of(Runner)

MOST_COUNTED = 100_000
MOST_RUNNERS = 1_000


def count_builds(tx: Session, state: str) -> int:
    """How many builds have this state, counted up to a limit."""
    return _count(tx, BUILDS.c.state, state)


def count_steps(tx: Session, state: str) -> int:
    """How many steps have this state, counted up to a limit."""
    return _count(tx, STEPS.c.state, state)


def find_oldest_ready(tx: Session, state: str) -> datetime | None:
    """Since when the step that has waited longest has this state."""
    found: datetime | None = (
        tx.connection().execute(select(func.min(STEPS.c.ready_at)).where(STEPS.c.state == state)).scalar()
    )
    return found


def list_runners_seen(tx: Session, *, now: datetime, within: timedelta) -> list[Row[Any]]:
    """The runners heard lately, the most recent first."""
    statement = (
        select(RUNNERS)
        .where(RUNNERS.c.revoked_at.is_(None), RUNNERS.c.last_seen_at >= now - within)
        .order_by(RUNNERS.c.last_seen_at.desc(), RUNNERS.c.id)
        .limit(MOST_RUNNERS)
    )
    return list(tx.connection().execute(statement).all())


def _count(tx: Session, column: Any, value: str) -> int:
    some = select(column).where(column == value).limit(MOST_COUNTED).subquery()
    return int(tx.connection().execute(select(func.count()).select_from(some)).scalar_one())
