"""The runners this coordinator knows."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import runners, tenants
from coordinator.tables import Runner


def list_runners(tx: Session, caller: Caller) -> list[tuple[Runner, str | None]]:
    """Those that may take the steps of the caller's tenant, each with its account unless it is shared."""
    if caller.tenant_id is None and not caller.sees_all_tenants:
        return []
    found = runners.list_runners(tx, caller.tenant_id)
    accounts = tenants.list_accounts(tx, {one.tenant_id for one in found if one.tenant_id is not None})
    return [(runner, accounts.get(runner.tenant_id or "")) for runner in found]
