"""Who belongs to a tenant."""

from typing import Any

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import accounts, tenants


def list_members(tx: Session, caller: Caller, tenant_id: str) -> list[Any]:
    """The members of a tenant by address."""
    tenant = tenants.get_tenant(tx, caller, tenant_id)
    return accounts.list_members(tx, tenant.id)
