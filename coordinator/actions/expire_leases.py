"""What silence means: claims nobody acknowledged, and runners nobody hears."""

from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.actions.lose_attempt import lose_attempt
from coordinator.actions.requeue_claim import requeue_claim
from coordinator.rules.access import SYSTEM
from coordinator.site import Site
from coordinator.store import steps

BATCH = 100
EXCLUSIVE_LOST_AFTER = timedelta(seconds=300)


def expire_leases(tx: Session, site: Site, *, now: datetime, since: datetime | None = None) -> int:
    """Move every step whose holder is gone; returns how many moved.

    `since`: from when on this coordinator has been there to hear anybody, its start if nothing is said.
    """
    watched = now - (since or site.started_at)
    moved = 0
    if watched >= timedelta(seconds=site.settings.claim_ttl):
        moved += _expire_claims(tx, site, now=now)
    if watched >= timedelta(seconds=site.settings.amnesty):
        moved += _expire_silent(tx, site, now=now)
    return moved


def _expire_claims(tx: Session, site: Site, *, now: datetime) -> int:
    before = now - timedelta(seconds=site.settings.claim_ttl)
    moved = 0
    for step in sorted(steps.list_unacknowledged(tx, before=before, limit=BATCH), key=steps.by_build):
        moved += requeue_claim(tx, site, SYSTEM, step, outcome="unclaimed", detail=None, now=now)
    return moved


def _expire_silent(tx: Session, site: Site, *, now: datetime) -> int:
    silent_since = now - timedelta(seconds=site.settings.lost_after)
    moved = 0
    exclusive_until = now - EXCLUSIVE_LOST_AFTER
    silent = steps.list_silent(tx, before=silent_since, exclusive_until=exclusive_until, limit=BATCH)
    for step in sorted(silent, key=steps.by_build):
        moved += lose_attempt(tx, site, step, now=now)
    return moved
