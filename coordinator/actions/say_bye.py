"""A runner leaves; what it claimed and never began is ready again."""

from datetime import datetime

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.rules.transitions import StepEvent
from coordinator.store import attempts, runners, steps


def say_bye(tx: Session, caller: Caller, *, now: datetime) -> None:
    """Give back every claim of this runner that it has not acknowledged."""
    runner_id = caller.runner_id or ""
    for step in steps.list_unacknowledged(tx, before=now, limit=1000):
        if step.runner_id != runner_id:
            continue
        moved = steps.move_step(
            tx, step.id, StepEvent.REQUEUE, attempt=step.attempt, runner_id=None, request_id=None
        )
        if moved:
            attempts.change_attempt(tx, step.id, step.attempt, outcome="released", finished_at=now)
    runners.change_runner(tx, runner_id, now=now, session=None, slots=0)
