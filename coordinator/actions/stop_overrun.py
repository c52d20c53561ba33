"""The coordinator's own watch over time limits: for runners that speak and do not keep them."""

from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.rules.access import SYSTEM
from coordinator.rules.limits import PREPARATION_LIMIT, pull_timeout_seconds, run_allowance
from coordinator.site import Site
from coordinator.store import audit, deadlines, stops
from shared.reasons import Reason

BATCH = 100
DELIVERY_LIMIT = timedelta(hours=1)


def stop_overrun(tx: Session, site: Site, *, now: datetime, since: datetime | None = None) -> int:
    """Tell runners to stop steps that they should have ended themselves; returns how many.

    The watch begins anew when the coordinator was away: what ended meanwhile has yet to be told.
    """
    watched = now - (since or site.started_at)
    told = 0
    for step in deadlines.list_overrun(tx, now=now, delivery_limit=DELIVERY_LIMIT, limit=BATCH):
        if watched >= run_allowance(step.spec):
            told += _stop(tx, step, Reason.TIMEOUT, now=now)
    for step in deadlines.list_unstarted(tx, before=now - PREPARATION_LIMIT, limit=BATCH):
        allowance = PREPARATION_LIMIT + timedelta(seconds=pull_timeout_seconds(step.spec))
        if now - step.claimed_at >= allowance and watched >= allowance:
            told += _stop(tx, step, Reason.PULL_TIMEOUT, now=now)
    return told


def _stop(tx: Session, step: Any, reason: Reason, *, now: datetime) -> int:
    if not stops.request_stop(tx, step.id, step.attempt, reason=reason, now=now):
        return 0
    audit.record_step(tx, SYSTEM, "step.overrun", step, now=now, reason=str(reason))
    return 1
