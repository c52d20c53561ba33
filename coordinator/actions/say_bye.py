"""A runner leaves; what it claimed and never began is ready again."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.requeue_claim import requeue_claim
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import runners, steps


def say_bye(tx: Session, site: Site, caller: Caller, *, now: datetime) -> None:
    """Give back every claim of this runner that it has not acknowledged."""
    runner_id = caller.runner_id or ""
    for step in sorted(steps.list_unacknowledged_of(tx, runner_id), key=steps.by_build):
        requeue_claim(tx, site, caller, step, outcome="released", detail=None, now=now)
    runners.change_runner(tx, runner_id, now=now, session=None, slots=0)
