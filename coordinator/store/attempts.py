"""The history of attempts: opened by a claim, ended once."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select, update
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.tables import StepAttempt, table_of

ATTEMPTS = table_of(StepAttempt)


def insert_attempts(tx: Session, steps: Sequence[Any], *, now: datetime) -> None:
    """One row for each step that has just been claimed."""
    rows = [
        {
            "step_id": step.id,
            "attempt": step.attempt,
            "runner_id": step.runner_id,
            "request_id": step.request_id,
            "claimed_at": now,
            "oom": False,
            "output_paths": [],
            "log_size": 0,
            "log_state": "open",
        }
        for step in steps
    ]
    tx.connection().execute(insert(ATTEMPTS), rows)


def find_attempt(tx: Session, step_id: str, attempt: int) -> Row[Any] | None:
    statement = select(ATTEMPTS).where(ATTEMPTS.c.step_id == step_id, ATTEMPTS.c.attempt == attempt)
    return tx.connection().execute(statement).one_or_none()


def change_attempt(tx: Session, step_id: str, attempt: int, **values: Any) -> None:
    statement = (
        update(ATTEMPTS).where(ATTEMPTS.c.step_id == step_id, ATTEMPTS.c.attempt == attempt).values(**values)
    )
    tx.connection().execute(statement)


def list_attempts(tx: Session, step_ids: Sequence[str]) -> dict[str, list[Row[Any]]]:
    """All attempts of these steps, first to last."""
    statement = select(ATTEMPTS).where(ATTEMPTS.c.step_id.in_(step_ids)).order_by(ATTEMPTS.c.attempt)
    attempts: dict[str, list[Row[Any]]] = {}
    for row in tx.connection().execute(statement):
        attempts.setdefault(row.step_id, []).append(row)
    return attempts


def was_request_used(tx: Session, *, runner_id: str, request_id: str) -> bool:
    """True when this acquire has been answered with steps before."""
    statement = (
        select(ATTEMPTS.c.step_id)
        .where(ATTEMPTS.c.runner_id == runner_id, ATTEMPTS.c.request_id == request_id)
        .limit(1)
    )
    return tx.connection().execute(statement).first() is not None
