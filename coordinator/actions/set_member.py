"""A user gets a role in a tenant, or another one."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.errors import Conflict, Denied
from coordinator.rules.access import Caller
from coordinator.rules.permissions import Role, may_give
from coordinator.store import accounts, audit, tenants


def set_member(
    tx: Session, caller: Caller, tenant_id: str, user_id: str, role: Role, *, now: datetime
) -> tuple[Any, bool]:
    """Give the role; returns the member and whether it is new. A tenant that has an owner keeps one."""
    tenant = tenants.get_tenant(tx, caller, tenant_id)
    tenants.lock_tenant(tx, tenant.id)
    user = accounts.get_user(tx, user_id)
    before = accounts.find_role(tx, tenant.id, user.id)
    require_giver(tx, caller, tenant.id, role, before)
    if before == Role.OWNER and role is not Role.OWNER:
        require_another_owner(tx, tenant.id, user.id)
    accounts.set_role(tx, tenant.id, user.id, role, now=now)
    audit.record(
        tx,
        caller,
        "member.changed" if before else "member.added",
        now=now,
        tenant_id=tenant.id,
        userId=user.id,
        role=str(role),
        roleBefore=before,
    )
    return get_member(tx, tenant.id, user.id), before is None


def get_member(tx: Session, tenant_id: str, user_id: str) -> Any:
    """One row of `list_members`."""
    return next(row for row in accounts.list_members(tx, tenant_id) if row.user_id == user_id)


def require_another_owner(tx: Session, tenant_id: str, user_id: str) -> None:
    """Somebody besides this user has to be left who may make owners; the tenant is held."""
    if not accounts.count_other_owners(tx, tenant_id, user_id):
        raise Conflict("this is the last owner of the tenant")


def require_giver(tx: Session, caller: Caller, tenant_id: str, role: Role, before: str | None) -> None:
    """Nobody gives, or takes, more than they have themselves."""
    if caller.is_operator:
        return
    own = accounts.find_role(tx, tenant_id, caller.user_id) if caller.user_id else None
    own = own or Role.VIEWER
    if not may_give(own, role) or (before is not None and not may_give(own, Role(before))):
        raise Denied(f"the role {own} may not do that")
