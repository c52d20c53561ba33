"""A claim whose script never ran comes back."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.end_unheard import close_unheard, write_unended
from coordinator.actions.settle_build import settle_build
from coordinator.rules.access import Caller
from coordinator.rules.limits import event_of_stop
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import audit, builds, steps
from shared.states import FINAL_STEP_STATES, StepState


def requeue_claim(
    tx: Session, site: Site, caller: Caller, step: Any, *, outcome: str, detail: str | None, now: datetime
) -> bool:
    """Ready again with no retry consumed, or at its end if it was told to stop.

    `step` is the row as it was found; False when its runner has been heard since, or it has moved on.
    """
    builds.lock_build(tx, step.build_id)
    held = steps.get_step(tx, step.id)  # it may have said something before its build was held
    whole = write_unended(tx, site, held)
    moved = steps.move_step(
        tx,
        step.id,
        StepEvent.REQUEUE,
        attempt=step.attempt,
        unheard_since=step.last_seen_at,
        runner_id=None,
        request_id=None,
        not_before=now,
        log_size=whole,
    )
    current = steps.get_step(tx, step.id)  # it may be told to stop at any moment, by who does not hold it
    if not moved and current.cancel_requested_at is not None:
        event = event_of_stop(current.cancel_reason)
        outcome = StepState.FAILED if event is StepEvent.FAIL else StepState.CANCELLED
        moved = steps.move_step(
            tx,
            step.id,
            event,
            attempt=step.attempt,
            unheard_since=step.last_seen_at,
            finished_at=now,
            reason=current.cancel_reason,
            log_size=whole,
        )
    if moved:
        close_unheard(tx, held, whole, outcome=outcome, detail=detail, now=now)
        _record(tx, caller, step, outcome, detail or current.cancel_reason, now=now)
        if outcome in FINAL_STEP_STATES:
            settle_build(tx, site, step.build_id, [step], reason=current.cancel_reason, now=now)
    return moved


def _record(
    tx: Session, caller: Caller, step: Any, outcome: str, reason: str | None, *, now: datetime
) -> None:
    if outcome in FINAL_STEP_STATES:
        audit.record_step(tx, caller, "step.finished", step, now=now, state=str(outcome), reason=reason)
    elif outcome == "released":
        audit.record_step(tx, caller, "step.released", step, now=now, reason=reason)
    else:
        audit.record_step(tx, caller, "step.requeued", step, now=now, reason=outcome)
