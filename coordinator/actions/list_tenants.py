"""The tenants of this installation."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import tenants
from coordinator.tables import Tenant


def list_tenants(tx: Session, _caller: Caller, *, limit: int, offset: int) -> list[Tenant]:
    """By account; the route is for the operator alone."""
    return tenants.list_tenants(tx, limit=limit, offset=offset)
