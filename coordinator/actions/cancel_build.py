"""A build is to stop: what waits ends at once, what runs is told."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.settle_build import settle_build
from coordinator.actions.show_build import get_visible_build
from coordinator.errors import Conflict
from coordinator.rules.access import Caller
from coordinator.rules.transitions import BuildEvent
from coordinator.store import audit, builds, steps
from coordinator.tables import Build
from shared.ids import new_id
from shared.reasons import Reason
from shared.states import BuildState


def cancel_build(tx: Session, caller: Caller, build_id: str, *, now: datetime) -> Build:
    """Ask for the build's end; asked again, the same receipt. A build that has ended is a Conflict."""
    get_visible_build(tx, caller, build_id)
    held = builds.lock_build(tx, build_id)
    state = BuildState(held.state)
    if state is BuildState.CANCELLING or (state is BuildState.CANCELLED and held.cancel_requested_at):
        return _fresh(tx, build_id)
    if state.is_final:
        raise Conflict(f"the build has ended as {state}")
    builds.move_build(tx, build_id, BuildEvent.REQUEST_CANCEL, cancel_requested_at=now, cancel_id=new_id())
    steps.cancel_waiting(tx, build_id, reason=Reason.CANCELLED, now=now)
    steps.request_cancel(tx, build_id, reason=Reason.CANCELLED, now=now)
    audit.record(tx, caller, "build.cancelled", now=now, project_id=held.project_id, buildId=build_id)
    settle_build(tx, build_id, [], reason=Reason.CANCELLED, now=now)
    return _fresh(tx, build_id)


def _fresh(tx: Session, build_id: str) -> Build:
    tx.expire_all()
    return builds.get_build(tx, build_id)
