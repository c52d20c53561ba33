"""A net: whatever came to wait again in a build that has to end is ended as well."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.settle_build import settle_build
from coordinator.rules.access import SYSTEM
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import audit, builds, stops
from shared.reasons import Reason
from shared.states import BuildState

BATCH = 100


def end_stopped_builds(tx: Session, site: Site, *, now: datetime, since: datetime | None = None) -> int:
    """End what waits in builds that are cancelled or overdue; returns how many steps.

    A stop ends all that waits in its own transaction, so there is nothing to find. If there ever is, nobody
    else would end it: such a step, and with it its build, would wait for ever, or run in spite of the stop.
    """
    return sum(_end(tx, site, found.id, now=now) for found in stops.list_stopped_builds(tx, limit=BATCH))


def _end(tx: Session, site: Site, build_id: str, *, now: datetime) -> int:
    build = builds.lock_build(tx, build_id)
    if build.state == BuildState.CANCELLING:
        event, reason = StepEvent.CANCEL, Reason.CANCELLED
    elif build.reason == Reason.BUILD_TIMEOUT and build.state == BuildState.RUNNING:
        event, reason = StepEvent.SKIP, Reason.BUILD_TIMEOUT
    else:
        return 0  # it has ended, or runs again, since it was found
    ended = stops.end_waiting(tx, build_id, event, reason=reason, now=now)
    stops.request_stop_of_build(tx, build_id, reason=reason, now=now)
    if ended:
        about: dict[str, Any] = {"buildId": build_id, "steps": len(ended), "reason": str(reason)}
        audit.record(tx, SYSTEM, "build.stopped", now=now, project_id=build.project_id, **about)
    settle_build(tx, site, build_id, ended, reason=reason, now=now)
    return len(ended)
