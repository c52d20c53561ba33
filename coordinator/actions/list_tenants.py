"""The tenants of this installation."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import tenants
from coordinator.tables import Tenant


def list_tenants(
    tx: Session, _caller: Caller, *, account: str | None, limit: int, offset: int
) -> list[Tenant]:
    """By account, or only the one of this account or id; the route is for the operator alone."""
    if account is not None:
        found = tenants.find_tenant(tx, account)
        return [found] if found is not None and offset == 0 else []
    return tenants.list_tenants(tx, limit=limit, offset=offset)
