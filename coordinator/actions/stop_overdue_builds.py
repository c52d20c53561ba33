"""A build whose time is over: what waits is skipped, what runs is told to stop, and the build fails."""

from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.actions.settle_build import settle_build
from coordinator.rules.access import SYSTEM
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import audit, builds, deadlines, stops
from shared.reasons import Reason

BATCH = 100


def stop_overdue_builds(tx: Session, site: Site, *, now: datetime, since: datetime | None = None) -> int:
    """End every build that has run for longer than its limit; returns how many.

    One that ran before the coordinator was away is given the amnesty, so that what ended then can be told.
    """
    watched_since = since or site.started_at
    trusted_from = watched_since + timedelta(seconds=site.settings.amnesty)
    for build in deadlines.list_unlimited_builds(tx, limit=BATCH):
        deadline = build.started_at + timedelta(seconds=build.timeout_s)
        deadlines.set_build_deadline(tx, build.id, build.started_at, deadline)
    stopped = 0
    for build in deadlines.list_overdue_builds(tx, now=now, limit=BATCH):
        if build.started_at >= watched_since or now >= trusted_from:
            stopped += _stop(tx, site, build, now=now)
    return stopped


def _stop(tx: Session, site: Site, build: Any, *, now: datetime) -> int:
    builds.lock_build(tx, build.id)
    if not deadlines.mark_build_overdue(tx, build.id, now=now):
        return 0
    waited = stops.end_waiting(tx, build.id, StepEvent.SKIP, reason=Reason.BUILD_TIMEOUT, now=now)
    stops.request_stop_of_build(tx, build.id, reason=Reason.BUILD_TIMEOUT, now=now)
    about = {"buildId": build.id, "reason": str(Reason.BUILD_TIMEOUT)}
    audit.record(tx, SYSTEM, "build.overdue", now=now, project_id=build.project_id, **about)
    settle_build(tx, site, build.id, waited, reason=Reason.BUILD_TIMEOUT, now=now)
    return 1
