"""A runner is one no more."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.lose_attempt import lose_attempt
from coordinator.actions.requeue_claim import requeue_claim
from coordinator.errors import NotFound
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, runners, steps


def revoke_runner(tx: Session, site: Site, caller: Caller, runner_id: str, *, now: datetime) -> int:
    """Its secret counts no more, and what it holds goes to others as if it had been lost; how many steps.

    What it was heard of at this very moment stays, and is found by the watch when it is silent.
    """
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
    given_up = 0
    for step in steps.list_leased_of(tx, runner.id):
        if step.acked_at is None:
            given_up += requeue_claim(
                tx, caller, step, outcome="unclaimed", detail="its runner was revoked", now=now
            )
        else:
            given_up += lose_attempt(tx, site, step, now=now)
    return given_up
