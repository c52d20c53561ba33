"""The bash script of a step, as the published contract hands it out."""

from typing import Any

from sqlmodel import Session

from coordinator.actions.leased_step import LeaseProof, get_attempt
from coordinator.actions.render_claim import render_script
from coordinator.actions.show_build import get_visible_step
from coordinator.rules.access import Audience, Caller
from coordinator.site import Site
from coordinator.store import builds, steps
from shared.states import StepState


def show_script(tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof | None) -> str:
    """The script; nothing changes. With a proof, only for the attempt that is current."""
    step = _step(tx, caller, step_id)
    if proof is not None:
        get_attempt(tx, site, caller, step_id, proof)
    build = builds.get_build(tx, step.build_id)
    is_waiting = step.state in (StepState.PENDING, StepState.READY)
    return render_script(step, build, attempt=step.attempt + 1 if is_waiting else step.attempt)


def _step(tx: Session, caller: Caller, step_id: str) -> Any:
    """A user sees the steps of visible builds; a runner has proved that the step is its own."""
    if caller.audience is Audience.USER:
        return get_visible_step(tx, caller, step_id)[0]
    return steps.get_step(tx, step_id)
