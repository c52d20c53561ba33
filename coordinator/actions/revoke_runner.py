"""A runner is one no more."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.lose_attempt import take_attempt_away
from coordinator.actions.requeue_claim import requeue_claim
from coordinator.errors import NotFound
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, runners, steps


def revoke_runner(tx: Session, site: Site, caller: Caller, runner_id: str, *, now: datetime) -> int:
    """Its secret counts no more, and what it holds goes to others as if it had been lost; how many steps."""
    runner = runners.get_runner(tx, caller, runner_id)
    if not runners.revoke_runner(tx, runner.id, now=now):
        raise NotFound("no such runner")
    audit.record(
        tx,
        caller,
        "runner.revoked",
        now=now,
        tenant_id=runner.tenant_id,
        runnerId=runner.id,
        name=runner.name,
    )
    return sum(_give_up(tx, site, caller, step, now=now) for step in steps.list_leased_of(tx, runner.id))


def _give_up(tx: Session, site: Site, caller: Caller, step: Any, *, now: datetime) -> int:
    """A claim that nothing was heard of goes back as it was; of all else some of the script may have run."""
    if step.acked_at is None:
        why = "its runner was revoked"
        if requeue_claim(tx, site, caller, step, outcome="unclaimed", detail=why, now=now):
            return 1
    return take_attempt_away(tx, site, step, now=now)
