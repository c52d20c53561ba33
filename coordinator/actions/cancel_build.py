"""A build is to stop: what waits ends at once, what runs is told."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.settle_build import settle_build
from coordinator.actions.show_build import get_visible_build
from coordinator.errors import Conflict
from coordinator.rules.access import Caller
from coordinator.rules.transitions import BuildEvent, StepEvent
from coordinator.site import Site
from coordinator.store import audit, builds, cancels, stops
from coordinator.tables import Build
from shared.ids import new_id
from shared.reasons import Reason
from shared.states import BuildState


def cancel_build(tx: Session, site: Site, caller: Caller, build_id: str, *, now: datetime) -> Build:
    """Ask for the build's end; asked again, the same receipt. A build that has ended is a Conflict."""
    get_visible_build(tx, caller, build_id)
    held = builds.lock_build(tx, build_id)
    state = BuildState(held.state)
    if state is BuildState.CANCELLING or (state is BuildState.CANCELLED and held.cancel_requested_at):
        return _fresh(tx, build_id)
    if state.is_final:
        raise Conflict(f"the build has ended as {state}")
    cancel_id = new_id()
    asked = {"cancel_requested_at": now, "cancel_id": cancel_id}
    builds.move_build(tx, build_id, BuildEvent.REQUEST_CANCEL, now=now, **asked)
    waited = _stop_steps(tx, build_id, cancel_id, now=now)
    audit.record(tx, caller, "build.cancelled", now=now, project_id=held.project_id, buildId=build_id)
    settle_build(tx, site, build_id, waited, reason=Reason.CANCELLED, now=now)
    return _fresh(tx, build_id)


def cancel_unfinished_build(
    tx: Session, site: Site, caller: Caller, build_id: str, *, now: datetime
) -> Build:
    """`cancel_build` for who is told of every build that has ended, also of one that was cancelled."""
    get_visible_build(tx, caller, build_id)
    if BuildState(builds.lock_build(tx, build_id).state).is_final:
        raise Conflict("the build has ended")
    return cancel_build(tx, site, caller, build_id, now=now)


def _stop_steps(tx: Session, build_id: str, cancel_id: str, *, now: datetime) -> list[Any]:
    """Stop everything that has not ended, and write down which attempts that concerns; what has ended so."""
    waited = stops.end_waiting(tx, build_id, StepEvent.CANCEL, reason=Reason.CANCELLED, now=now)
    stops.request_stop_of_build(tx, build_id, reason=Reason.CANCELLED, now=now)
    leased = stops.list_leased(tx, build_id)
    stopped = [(step.id, step.attempt) for step in leased]
    # a runner that was given up may still have the container, also of a step that has failed
    stopped += cancels.list_lost_attempts(tx, build_id)
    named = {step_id for step_id, _ in stopped}
    stopped += [(step.id, cancels.NO_ATTEMPT) for step in waited if step.id not in named]
    cancels.insert_cancel(tx, cancel_id, build_id, stopped, now=now)
    return waited


def _fresh(tx: Session, build_id: str) -> Build:
    tx.expire_all()
    return builds.get_build(tx, build_id)
