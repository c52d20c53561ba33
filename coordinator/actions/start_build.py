"""A build that was only written down begins to wait for runners."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.show_build import get_visible_build
from coordinator.errors import Conflict
from coordinator.rules.access import Caller
from coordinator.rules.transitions import BuildEvent
from coordinator.store import audit, builds, steps
from coordinator.tables import Build
from shared.states import BuildState


def start_build(tx: Session, caller: Caller, build_id: str, *, now: datetime) -> Build:
    """Let runners have the build's first steps; a Conflict for one that was started or has ended."""
    get_visible_build(tx, caller, build_id)
    held = builds.lock_build(tx, build_id)
    tx.expire_all()
    build = get_visible_build(tx, caller, build_id)  # it may have been deleted while its row was waited for
    if not builds.move_build(tx, build_id, BuildEvent.QUEUE, now=now):
        ended = BuildState(held.state).is_final
        raise Conflict("the build has ended" if ended else "the build has been started")
    steps.unblock_first(tx, build_id, now=now)
    audit.record(tx, caller, "build.started", now=now, project_id=build.project_id, buildId=build_id)
    tx.expire_all()
    return builds.get_build(tx, build_id)
