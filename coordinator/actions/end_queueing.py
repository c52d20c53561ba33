"""A step that no runner took within its limit has failed."""

from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.actions.settle_build import settle_build
from coordinator.rules.access import SYSTEM
from coordinator.site import Site
from coordinator.store import audit, builds, deadlines
from shared.reasons import Reason
from shared.states import StepState

BATCH = 100


def end_queueing(tx: Session, site: Site, *, now: datetime, since: datetime | None = None) -> int:
    """Fail what has waited too long since it could be taken, while there was a coordinator to ask."""
    watched_since = since or site.started_at
    ended = 0
    for limit_s, first_ready_at in deadlines.list_queue_limits(tx):
        before = now - timedelta(seconds=limit_s)
        if before < watched_since or first_ready_at > before:
            continue
        for step in deadlines.list_queued(tx, limit_s=limit_s, before=before, limit=BATCH - ended):
            ended += _fail(tx, site, step, now=now)
        if ended >= BATCH:
            break  # the others at the next look: who writes at the same time need not wait for them all
    return ended


def _fail(tx: Session, site: Site, step: Any, *, now: datetime) -> int:
    builds.lock_build(tx, step.build_id)
    if not deadlines.fail_queued(tx, step, reason=Reason.QUEUE_TIMEOUT, now=now):
        return 0
    about = {"state": str(StepState.FAILED), "reason": str(Reason.QUEUE_TIMEOUT)}
    audit.record_step(tx, SYSTEM, "step.finished", step, now=now, **about)
    settle_build(tx, site, step.build_id, [step], reason=Reason.QUEUE_TIMEOUT, now=now)
    return 1
