"""A runner gives a step back before any of its script has run."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.leased_step import LeaseProof, get_leased_step
from coordinator.actions.requeue_claim import requeue_claim
from coordinator.errors import Conflict, StaleAttempt
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import builds
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
    if not requeue_claim(tx, site, caller, step, outcome="released", detail=reason or None, now=now):
        raise StaleAttempt("the step has moved on")
