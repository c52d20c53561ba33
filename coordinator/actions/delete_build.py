"""A build goes, with its logs and artifacts."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.show_build import get_visible_build
from coordinator.errors import Conflict
from coordinator.rules.access import Caller
from coordinator.rules.retention import Part
from coordinator.store import audit, builds, retention
from shared.states import BuildState


def delete_build(tx: Session, caller: Caller, build_id: str, *, now: datetime) -> None:
    """Hide the build from everybody; rows and files follow, as with all that expires.

    A Conflict for one that was started and has not ended.
    """
    get_visible_build(tx, caller, build_id)
    builds.lock_build(tx, build_id)
    tx.expire_all()
    build = get_visible_build(tx, caller, build_id)
    state = BuildState(build.state)
    if state is not BuildState.CREATED and not state.is_final:
        raise Conflict("the build has been started and has not ended; cancel it first")
    retention.mark(tx, [build_id], Part.BUILD, now=now)
    about: dict[str, Any] = {"buildId": build_id, "number": build.number, "state": str(state)}
    audit.record(tx, caller, "build.deleted", now=now, project_id=build.project_id, **about)
