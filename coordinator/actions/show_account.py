"""Who the caller is, and what it may do where."""

from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from coordinator.access_tables import User
from coordinator.rules.access import Caller
from coordinator.store import accounts, tenants


@dataclass(frozen=True)
class AccountView:
    """`user` is None for what acts for nobody; `tenants` are id, account, role and permissions."""

    user: User | None
    tenants: list[tuple[str, str, str | None, list[str]]]
    is_operator: bool


def show_account(tx: Session, caller: Caller) -> AccountView:
    """The caller by its credential. The operator belongs to no tenant and may act in each."""
    user = accounts.get_user(tx, caller.user_id) if caller.user_id else None
    roles: dict[str, Any] = {}
    if user is not None:
        roles = {row.id: row.role for row in accounts.list_memberships(tx, user.id)}
    shown = [
        (tenant_id, tenants.get_account(tx, tenant_id), roles.get(tenant_id), sorted(permissions))
        for tenant_id, permissions in sorted((caller.grants or {}).items())
    ]
    return AccountView(user, shown, caller.is_operator)
