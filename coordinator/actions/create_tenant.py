"""A new tenant, under an account of its own."""

from datetime import datetime

from sqlmodel import Session

from coordinator.errors import AlreadyExists, Invalid
from coordinator.rules.access import Caller
from coordinator.rules.names import may_be_account
from coordinator.store import audit, tenants
from coordinator.tables import Tenant
from shared.faults import Fault
from shared.references import InvalidReference, display_name


def create_tenant(tx: Session, caller: Caller, *, account: str, now: datetime) -> Tenant:
    """Make the tenant; its account is what `accountId` says in the Build Server API."""
    try:
        account = display_name(account, maximum=255)
    except InvalidReference as error:
        raise Invalid("the tenant is not valid", details=(Fault("accountId", str(error)),)) from error
    if not may_be_account(account):
        reason = "must not look like an id"
        raise Invalid("the tenant is not valid", details=(Fault("accountId", reason),))
    tenant = tenants.insert_tenant(tx, account, now=now)
    if tenant is None:
        raise AlreadyExists("a tenant with this account already exists")
    audit.record(tx, caller, "tenant.created", now=now, tenant_id=tenant.id, account=account)
    return tenant
