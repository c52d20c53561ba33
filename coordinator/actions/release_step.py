"""A runner gives a step back before any of its script has run."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.leased_step import LeaseProof, get_leased_step
from coordinator.actions.settle_build import settle_build
from coordinator.errors import Conflict
from coordinator.rules.access import Caller
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import attempts, builds, steps
from shared.reasons import Reason
from shared.states import StepState


def release_step(
    tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof, *, reason: str, now: datetime
) -> None:
    """Back to ready, no retry consumed; a step whose script may have run is a Conflict."""
    step = get_leased_step(tx, site, caller, step_id, proof)
    builds.lock_build(tx, step.build_id)
    step = get_leased_step(tx, site, caller, step_id, proof)
    if step.state != StepState.CLAIMED:
        raise Conflict("the script may have run; complete the step instead")
    attempts.change_attempt(
        tx, step_id, proof.attempt, outcome="released", detail=reason or None, finished_at=now
    )
    if step.cancel_requested_at is not None:
        steps.move_step(
            tx, step_id, StepEvent.CANCEL, attempt=proof.attempt, finished_at=now, reason=Reason.CANCELLED
        )
        settle_build(tx, step.build_id, [step_id], reason=Reason.CANCELLED, now=now)
        return
    steps.move_step(tx, step_id, StepEvent.REQUEUE, attempt=proof.attempt, runner_id=None, request_id=None)
