"""Tenants by account or id."""

from datetime import datetime

from sqlmodel import Session, col, or_, select

from coordinator.errors import Foreign, NotFound
from coordinator.rules.access import Caller
from coordinator.store.dialect import insert_if_absent
from coordinator.tables import Tenant, table_of
from shared.ids import new_id

DEFAULT_ACCOUNT = "default"


def find_tenant(tx: Session, account: str) -> Tenant | None:
    """The tenant with this account text or, failing that, this id."""
    found = tx.exec(
        select(Tenant).where(or_(col(Tenant.account) == account, col(Tenant.id) == account)).limit(2)
    ).all()
    exact = [tenant for tenant in found if tenant.account == account]
    candidates = exact or list(found)
    return candidates[0] if candidates else None


def ensure_tenant(tx: Session, account: str, *, now: datetime) -> Tenant:
    """The tenant of this account, made when it is not there."""
    found = find_tenant(tx, account) or insert_tenant(tx, account, now=now) or find_tenant(tx, account)
    assert found is not None  # noqa: S101 - it was there or has just been inserted
    return found


def insert_tenant(tx: Session, account: str, *, now: datetime) -> Tenant | None:
    """The new tenant; None when the account is taken, also by who has just been quicker."""
    row = {"id": new_id(), "account": account, "created_at": now}
    return tx.get(Tenant, row["id"]) if insert_if_absent(tx, table_of(Tenant), row) else None


def has_tenant(tx: Session, tenant_id: str) -> bool:
    return tx.get(Tenant, tenant_id) is not None


def get_tenant(tx: Session, caller: Caller, tenant_id: str) -> Tenant:
    """The tenant, if the caller may see it; Denied where the caller may not do there what it asks for."""
    tenant = tx.get(Tenant, tenant_id)
    if tenant is None:
        raise NotFound("no such tenant")
    if not caller.may_see_tenant(tenant.id):
        raise Foreign("no such tenant")
    caller.require_in(tenant.id)
    return tenant


def list_tenants(tx: Session, *, limit: int, offset: int) -> list[Tenant]:
    """All tenants by account."""
    statement = select(Tenant).order_by(col(Tenant.account)).limit(limit).offset(offset)
    return list(tx.exec(statement).all())


def lock_tenant(tx: Session, tenant_id: str) -> None:
    """Hold the tenant until the transaction ends: its members change one after the other."""
    tx.exec(select(Tenant.id).where(col(Tenant.id) == tenant_id).with_for_update()).first()


def get_account(tx: Session, tenant_id: str) -> str:
    tenant = tx.get(Tenant, tenant_id)
    return tenant.account if tenant else tenant_id


def list_accounts(tx: Session, tenant_ids: set[str]) -> dict[str, str]:
    rows = tx.exec(select(Tenant).where(col(Tenant.id).in_(tenant_ids))).all()
    return {tenant.id: tenant.account for tenant in rows}
