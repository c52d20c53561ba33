"""The first tenant, user and token of an installation, so that somebody can log in."""

from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.actions.create_token import create_token
from coordinator.actions.create_user import create_user
from coordinator.actions.set_member import set_member
from coordinator.rules.access import SYSTEM
from coordinator.rules.permissions import GRANTABLE, Role
from coordinator.store import accounts, tenants

EMAIL = "owner@buildmill.local"
_LIFETIME = timedelta(days=366)


@dataclass(frozen=True)
class FirstAccount:
    """Shown once, stored nowhere."""

    tenant_id: str
    account: str
    email: str
    token: str = field(repr=False)


def make_first_account(
    tx: Session, account: str, *, password_hash: str, now: datetime
) -> FirstAccount | None:
    """Make them; None where there is a user already."""
    if accounts.list_users(tx, limit=1, offset=0):
        return None
    tenant = tenants.ensure_tenant(tx, account, now=now)
    user = create_user(tx, SYSTEM, email=EMAIL, name="", password_hash=password_hash, is_admin=False, now=now)
    set_member(tx, SYSTEM, tenant.id, user.id, Role.OWNER, now=now)
    maker = replace(SYSTEM, tenant_id=tenant.id, user_id=user.id)
    _, token = create_token(
        tx, maker, name="the first token", permissions=GRANTABLE, lifetime=_LIFETIME, now=now
    )
    return FirstAccount(tenant.id, tenant.account, user.email, token)
