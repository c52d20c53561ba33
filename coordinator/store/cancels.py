"""Receipts of cancellations: which attempts had to stop, and what became of them."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import and_, insert, select
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.errors import NotFound
from coordinator.store.rounds import IS_LATEST
from coordinator.store.statements import given
from coordinator.tables import Cancel, CancelStep, Step, StepAttempt, table_of

CANCELS = table_of(Cancel)
CANCEL_STEPS = table_of(CancelStep)
STEPS = table_of(Step)
ATTEMPTS = table_of(StepAttempt)
NO_ATTEMPT = 0

UNTOLD = ("lost", "forced")  # outcomes of attempts that ended without the word of their runner

_UNTOLD = (
    select(ATTEMPTS.c.step_id, ATTEMPTS.c.attempt)
    .join(STEPS, STEPS.c.id == ATTEMPTS.c.step_id)
    .where(
        STEPS.c.build_id == given(STEPS.c.build_id),
        IS_LATEST,
        ATTEMPTS.c.outcome.in_(UNTOLD),
        ATTEMPTS.c.cleaned_at.is_(None),
    )
)


def insert_cancel(
    tx: Session, cancel_id: str, build_id: str, stopped: Iterable[tuple[str, int]], *, now: datetime
) -> None:
    """The receipt, and on it each step with the attempt that had to stop."""
    connection = tx.connection()
    connection.execute(insert(CANCELS), {"id": cancel_id, "build_id": build_id, "requested_at": now})
    rows = [
        {"cancel_id": cancel_id, "step_id": step_id, "attempt": attempt, "build_id": build_id}
        for step_id, attempt in sorted(set(stopped))
    ]
    if rows:
        connection.execute(insert(CANCEL_STEPS), rows)


def list_lost_attempts(tx: Session, build_id: str) -> list[tuple[str, int]]:
    """Attempts of the steps that count now whose runner was given up, and has not said what is left of them.

    Also of steps that have failed with them.
    """
    rows = tx.connection().execute(_UNTOLD, {"the_build_id": build_id})
    return [(row.step_id, row.attempt) for row in rows]


def get_cancel(tx: Session, cancel_id: str) -> Row[Any]:
    row = tx.connection().execute(select(CANCELS).where(CANCELS.c.id == cancel_id)).one_or_none()
    if row is None:
        raise NotFound("no such cancellation")
    return row


def list_cancel_steps(tx: Session, cancel_id: str) -> list[Any]:
    """What is on the receipt, in the workflow's order, with the step and the attempt as they are now."""
    attempt = and_(ATTEMPTS.c.step_id == CANCEL_STEPS.c.step_id, ATTEMPTS.c.attempt == CANCEL_STEPS.c.attempt)
    statement = (
        select(
            CANCEL_STEPS.c.step_id,
            CANCEL_STEPS.c.attempt,
            STEPS.c.name,
            STEPS.c.state,
            STEPS.c.attempt.label("current_attempt"),
            STEPS.c.acked_at,
            STEPS.c.cancel_requested_at,
            STEPS.c.finished_at,
            ATTEMPTS.c.runner_id,
            ATTEMPTS.c.outcome,
            ATTEMPTS.c.started_at,
            ATTEMPTS.c.finished_at.label("attempt_finished_at"),
            ATTEMPTS.c.term_at,
            ATTEMPTS.c.dead_at,
            ATTEMPTS.c.cleaned_at,
            ATTEMPTS.c.leftovers,
        )
        .join(STEPS, STEPS.c.id == CANCEL_STEPS.c.step_id)
        .outerjoin(ATTEMPTS, attempt)
        .where(CANCEL_STEPS.c.cancel_id == cancel_id)
        .order_by(STEPS.c.position, STEPS.c.id, CANCEL_STEPS.c.attempt)
    )
    return list(tx.connection().execute(statement).all())
