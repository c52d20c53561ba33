"""A user no longer belongs to a tenant."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.set_member import require_another_owner, require_giver
from coordinator.errors import NotFound
from coordinator.rules.access import Caller
from coordinator.rules.permissions import Role
from coordinator.store import accounts, audit, tenants


def remove_member(tx: Session, caller: Caller, tenant_id: str, user_id: str, *, now: datetime) -> None:
    """Take the membership away, and the tokens made by it: who comes back later makes new ones.

    The last owner stays.
    """
    tenant = tenants.get_tenant(tx, caller, tenant_id)
    tenants.lock_tenant(tx, tenant.id)
    before = accounts.find_role(tx, tenant.id, user_id)
    if before is None:
        raise NotFound("no such member")
    require_giver(tx, caller, tenant.id, Role.VIEWER, before)
    if before == Role.OWNER:
        require_another_owner(tx, tenant.id, user_id)
    accounts.delete_membership(tx, tenant.id, user_id)
    revoked = accounts.revoke_tokens_of(tx, tenant.id, user_id, now=now)
    audit.record(
        tx,
        caller,
        "member.removed",
        now=now,
        tenant_id=tenant.id,
        userId=user_id,
        roleBefore=before,
        tokensRevoked=revoked or None,
    )
