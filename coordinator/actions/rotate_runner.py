"""A runner is asked to take a new secret."""

from datetime import datetime

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import audit, runners, tenants
from coordinator.tables import Runner


def rotate_runner(tx: Session, caller: Caller, runner_id: str, *, now: datetime) -> tuple[Runner, str | None]:
    """It hears so with its next heartbeat; until it uses the new secret the old one counts."""
    runner = runners.get_runner(tx, caller, runner_id)
    runners.request_rotation(tx, runner.id, now=now)
    audit.record(
        tx,
        caller,
        "runner.rotation_requested",
        now=now,
        tenant_id=runner.tenant_id,
        runnerId=runner.id,
        name=runner.name,
    )
    tx.refresh(runner)
    return runner, None if runner.tenant_id is None else tenants.get_account(tx, runner.tenant_id)
