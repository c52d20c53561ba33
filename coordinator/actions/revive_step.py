"""A runner that was given up comes back before anyone else took its step: it goes on."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.rules.transitions import StepEvent
from coordinator.store import attempts, audit, steps


def revive_step(tx: Session, caller: Caller, step: Any, *, now: datetime) -> bool:
    """Take back that the runner was lost, and the retry with it; False where its script had not begun."""
    if step.started_at is None:
        return False
    moved = steps.move_step(
        tx,
        step.id,
        StepEvent.REVIVE,
        attempt=step.attempt,
        not_before=None,
        reason=None,
        infra_retries=max(0, step.infra_retries - 1),
    )
    if moved:
        attempts.change_attempt(tx, step.id, step.attempt, outcome=None, reason=None, finished_at=None)
        row = attempts.find_attempt(tx, step.id, step.attempt)
        if row is not None and row.log_state == "gap":
            attempts.change_attempt(tx, step.id, step.attempt, log_state="open")
        audit.record_step(tx, caller, "step.revived", step, now=now)
    return moved
