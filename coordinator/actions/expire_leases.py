"""What silence means: claims nobody acknowledged, runners nobody hears, cancels nobody confirmed."""

from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.actions.requeue_claim import requeue_claim
from coordinator.actions.settle_build import settle_build
from coordinator.rules.access import SYSTEM
from coordinator.rules.leases import may_retry, retry_delay
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import attempts, audit, builds, steps
from shared.reasons import Reason
from shared.states import StepState

BATCH = 100
EXCLUSIVE_LOST_AFTER = timedelta(seconds=300)
CANCEL_PATIENCE = timedelta(seconds=20)
CANCEL_LIMIT = timedelta(seconds=70)


def expire_leases(tx: Session, site: Site, *, now: datetime) -> int:
    """Move every step whose holder is gone; returns how many moved."""
    moved = _expire_claims(tx, site, now=now)
    moved += _force_cancels(tx, now=now)
    if now - site.started_at >= timedelta(seconds=site.settings.amnesty):
        moved += _expire_silent(tx, site, now=now)
    return moved


def _expire_claims(tx: Session, site: Site, *, now: datetime) -> int:
    before = now - timedelta(seconds=site.settings.claim_ttl)
    moved = 0
    for step in steps.list_unacknowledged(tx, before=before, limit=BATCH):
        moved += requeue_claim(tx, SYSTEM, step, outcome="unclaimed", detail=None, now=now)
    return moved


def _expire_silent(tx: Session, site: Site, *, now: datetime) -> int:
    silent_since = now - timedelta(seconds=site.settings.lost_after)
    moved = 0
    exclusive_until = now - EXCLUSIVE_LOST_AFTER
    for step in steps.list_silent(tx, before=silent_since, exclusive_until=exclusive_until, limit=BATCH):
        moved += _lose(tx, step, now=now)
    return moved


def _lose(tx: Session, step: Any, *, now: datetime) -> int:
    builds.lock_build(tx, step.build_id)
    if may_retry(Reason.RUNNER_LOST, retries=step.infra_retries, exclusive=step.exclusive):
        # runner and attempt stay named: if that runner comes back first, it goes on
        moved = steps.move_step(
            tx,
            step.id,
            StepEvent.REQUEUE,
            attempt=step.attempt,
            unheard_since=step.last_seen_at,
            infra_retries=step.infra_retries + 1,
            not_before=now + retry_delay(step.infra_retries),
            reason=Reason.RUNNER_LOST,
        )
        event = "step.requeued"
    else:
        moved = steps.move_step(
            tx,
            step.id,
            StepEvent.FAIL,
            attempt=step.attempt,
            unheard_since=step.last_seen_at,
            finished_at=now,
            reason=Reason.RUNNER_LOST,
        )
        event = "step.finished"
    if not moved:
        return 0
    attempts.change_attempt(
        tx,
        step.id,
        step.attempt,
        outcome="lost",
        reason=Reason.RUNNER_LOST,
        finished_at=now,
        log_size=step.log_size,
    )
    _record(tx, step, event, Reason.RUNNER_LOST, now=now)
    settle_build(tx, step.build_id, [step.id], reason=Reason.RUNNER_LOST, now=now)
    return 1


def _record(tx: Session, step: Any, event: str, reason: str, *, now: datetime) -> None:
    audit.record_step(tx, SYSTEM, event, step, now=now, reason=str(reason))


def _force_cancels(tx: Session, *, now: datetime) -> int:
    """A cancel that the runner did not confirm ends without it."""
    moved = 0
    before, at_last = now - CANCEL_PATIENCE, now - CANCEL_LIMIT
    for step in steps.list_uncancelled(tx, before=before, at_last=at_last, limit=BATCH):
        builds.lock_build(tx, step.build_id)
        if steps.move_step(
            tx,
            step.id,
            StepEvent.CANCEL,
            attempt=step.attempt,
            finished_at=now,
            reason=step.cancel_reason,
        ):
            attempts.change_attempt(
                tx,
                step.id,
                step.attempt,
                outcome=StepState.CANCELLED,
                finished_at=now,
                log_size=steps.get_step(tx, step.id).log_size,
            )
            _record(tx, step, "step.finished", step.cancel_reason, now=now)
            settle_build(tx, step.build_id, [step.id], reason=step.cancel_reason, now=now)
            moved += 1
    return moved
