"""The secrets of projects, sealed: one current row per name, and those that were replaced or deleted.

Such a retired row stays only while an attempt that was given it may still ask for it.
"""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import and_, delete, func, insert, select, update
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.tables import ProjectSecret, Step, StepAttempt, table_of
from shared.states import FINAL_STEP_STATES, StepState

SECRETS = table_of(ProjectSecret)
STEPS = table_of(Step)
ATTEMPTS = table_of(StepAttempt)
UNFINISHED = sorted(set(StepState) - FINAL_STEP_STATES)


def list_current(tx: Session, project_id: str) -> list[Row[Any]]:
    """The project's secrets by name."""
    statement = (
        select(SECRETS)
        .where(SECRETS.c.project_id == project_id, SECRETS.c.retired_at.is_(None))
        .order_by(SECRETS.c.name)
    )
    return list(tx.connection().execute(statement).all())


def find_current(tx: Session, project_id: str, names: Collection[str]) -> dict[str, Row[Any]]:
    """Those of the named secrets that the project has."""
    statement = select(SECRETS).where(
        SECRETS.c.project_id == project_id, SECRETS.c.name.in_(names), SECRETS.c.retired_at.is_(None)
    )
    return {row.name: row for row in tx.connection().execute(statement)}


def list_by_id(tx: Session, project_id: str, ids: Collection[str]) -> list[Row[Any]]:
    """These rows of the project, current or retired, as far as they are still there."""
    statement = select(SECRETS).where(SECRETS.c.project_id == project_id, SECRETS.c.id.in_(ids))
    return list(tx.connection().execute(statement.order_by(SECRETS.c.name)).all())


def count_current(tx: Session, project_id: str) -> int:
    statement = select(func.count()).where(SECRETS.c.project_id == project_id, SECRETS.c.retired_at.is_(None))
    return int(tx.connection().execute(statement).scalar_one())


def insert_secret(tx: Session, row: dict[str, Any]) -> None:
    tx.connection().execute(insert(SECRETS), row)


def retire(tx: Session, project_id: str, name: str, *, now: datetime) -> bool:
    """The current row of this name is current no more; False when there is none."""
    statement = (
        update(SECRETS)
        .where(SECRETS.c.project_id == project_id, SECRETS.c.name == name, SECRETS.c.retired_at.is_(None))
        .values(retired_at=now)
    )
    return bool(tx.connection().execute(statement).rowcount)


def delete_all(tx: Session, project_id: str) -> None:
    tx.connection().execute(delete(SECRETS).where(SECRETS.c.project_id == project_id))


def delete_unused(tx: Session, *, retired_before: datetime, limit: int) -> int:
    """Delete rows that were retired before then and that no unfinished attempt was given; how many."""
    statement = (
        select(SECRETS.c.id)
        .where(SECRETS.c.retired_at < retired_before)
        .order_by(SECRETS.c.retired_at)
        .limit(limit)
    )
    unused = set(tx.connection().execute(statement).scalars())
    if unused:
        unused -= _in_use(tx)
    if unused:
        tx.connection().execute(delete(SECRETS).where(SECRETS.c.id.in_(unused)))
    return len(unused)


def _in_use(tx: Session) -> set[str]:
    """The rows that the current attempts of unfinished steps were given."""
    statement = (
        select(ATTEMPTS.c.secret_ids)
        .join(STEPS, and_(STEPS.c.id == ATTEMPTS.c.step_id, STEPS.c.attempt == ATTEMPTS.c.attempt))
        .where(STEPS.c.state.in_(UNFINISHED), ATTEMPTS.c.secret_ids.is_not(None))
    )
    return {one for ids in tx.connection().execute(statement).scalars() for one in ids.split(",")}


def note_given(tx: Session, step_id: str, attempt: int, ids: Sequence[str]) -> None:
    """Write down which rows an attempt is given."""
    statement = (
        update(ATTEMPTS)
        .where(ATTEMPTS.c.step_id == step_id, ATTEMPTS.c.attempt == attempt)
        .values(secret_ids=",".join(ids))
    )
    tx.connection().execute(statement)


def list_given(tx: Session, step_id: str, attempt: int) -> list[str]:
    """Which rows an attempt was given; empty when none was written down."""
    statement = select(ATTEMPTS.c.secret_ids).where(
        ATTEMPTS.c.step_id == step_id, ATTEMPTS.c.attempt == attempt
    )
    ids = tx.connection().execute(statement).scalar_one_or_none()
    return ids.split(",") if ids else []


def list_key_ids(tx: Session) -> set[str]:
    """The keys that the rows need."""
    return set(tx.connection().execute(select(SECRETS.c.key_id).distinct()).scalars())
