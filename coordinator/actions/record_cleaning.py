"""A runner says that what an attempt needed on its machine is gone."""

from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.actions.leased_step import LeaseProof, get_own_attempt
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import attempts, audit, steps
from shared.protocol import Cleaned


def record_cleaning(
    tx: Session,
    site: Site,
    caller: Caller,
    step_id: str,
    proof: LeaseProof,
    said: Cleaned,
    *,
    now: datetime,
) -> None:
    """Write down the times, as ages before now. Said again, nothing changes, unless something was left.

    Valid long after the attempt has ended, and another may have begun: also who was given up cleans up.
    """
    step = steps.get_step(tx, step_id)
    row = get_own_attempt(tx, site, caller, step_id, proof)
    if row.cleaned_at is not None and row.leftovers in ([], said.leftovers):
        return
    attempts.change_attempt(
        tx,
        step_id,
        proof.attempt,
        term_at=row.term_at or _before(now, said.term_age_s),
        dead_at=row.dead_at or _before(now, said.dead_age_s),
        cleaned_at=_before(now, said.cleaned_age_s),
        leftovers=said.leftovers,
    )
    audit.record(
        tx,
        caller,
        "step.cleaned",
        now=now,
        project_id=step.project_id,
        stepId=step_id,
        attempt=proof.attempt,
        leftovers=len(said.leftovers),
    )


def _before(now: datetime, age_s: float | None) -> datetime | None:
    return None if age_s is None else now - timedelta(seconds=age_s)
