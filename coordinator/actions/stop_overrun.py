"""The coordinator's own watch over time limits: for runners that speak and do not keep them."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
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
    for step in _overrun(tx, now=now):
        if watched >= run_allowance(step.spec):
            told += _stop(tx, step, Reason.TIMEOUT, now=now)
    for step in _unstarted(tx, now=now):
        allowance = PREPARATION_LIMIT + timedelta(seconds=pull_timeout_seconds(step.spec))
        if now - step.claimed_at >= allowance and watched >= allowance:
            told += _stop(tx, step, Reason.PULL_TIMEOUT, now=now)
    return told


def _overrun(tx: Session, *, now: datetime) -> Iterator[Any]:
    """All of them, page by page: those that may go on must not hide the ones behind them."""
    look = partial(deadlines.list_overrun, tx, now=now, delivery_limit=DELIVERY_LIMIT, limit=BATCH)
    page = look()
    while page:
        yield from page
        page = look(after=(page[-1].deadline_at, page[-1].id)) if len(page) == BATCH else []


def _unstarted(tx: Session, *, now: datetime) -> Iterator[Any]:
    look = partial(deadlines.list_unstarted, tx, before=now - PREPARATION_LIMIT, limit=BATCH)
    page = look()
    while page:
        yield from page
        page = look(after=(page[-1].claimed_at, page[-1].id)) if len(page) == BATCH else []


def _stop(tx: Session, step: Any, reason: Reason, *, now: datetime) -> int:
    if not stops.request_stop(tx, step.id, step.attempt, reason=reason, now=now):
        return 0
    audit.record_step(tx, SYSTEM, "step.overrun", step, now=now, reason=str(reason))
    return 1
