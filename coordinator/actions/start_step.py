"""A runner is about to let the script run."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.end_unheard import close_log_before
from coordinator.actions.leased_step import LeaseProof, hold_leased_step
from coordinator.errors import StaleAttempt
from coordinator.rules.access import Caller
from coordinator.rules.limits import grace_seconds, run_allowance, timeout_seconds
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import attempts, audit, steps
from shared.protocol import Start, StartAnswer
from shared.states import StepState


def start_step(
    tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof, said: Start, *, now: datetime
) -> StartAnswer:
    """Answer `go` once the step is recorded as running, or `cancel`. Asked again, the same answer."""
    step = hold_leased_step(tx, site, caller, step_id, proof)  # once a cancel was answered nothing may start
    limits = {"timeout_s": timeout_seconds(step.spec), "grace_s": grace_seconds(step.spec)}
    if step.cancel_requested_at is not None:
        return StartAnswer(action="cancel", **limits)
    if step.state == StepState.RUNNING:
        return StartAnswer(action="go", **limits)
    facts: dict[str, Any] = {"started_at": now, "image_digest": said.image_digest or None}
    moved = steps.move_step(
        tx,
        step_id,
        StepEvent.START,
        attempt=proof.attempt,
        phase="running",
        last_seen_at=now,
        acked_at=step.acked_at or now,
        deadline_at=now + run_allowance(step.spec),
        **facts,
    )
    if not moved:
        raise StaleAttempt("the step has moved on")
    attempts.change_attempt(tx, step_id, proof.attempt, **facts)
    if proof.attempt > 1:
        close_log_before(tx, site, step, now=now)
    audit.record_step(tx, caller, "step.started", step, now=now)
    return StartAnswer(action="go", **limits)
