"""A new project of an account."""

from datetime import datetime

from sqlmodel import Session

from coordinator.errors import Denied, Invalid
from coordinator.rules.access import Caller
from coordinator.store import audit, projects, tenants
from coordinator.tables import Project, Tenant
from shared.faults import Fault
from shared.ids import new_id
from shared.references import InvalidReference, display_name


def create_project(
    tx: Session, caller: Caller, *, account: str, name: str, now: datetime
) -> tuple[Project, str]:
    """Make a project and tell its account, which is made with it where the caller may do that."""
    name = _checked(name, "name", 100)
    tenant = _tenant_for(tx, caller, _checked(account, "accountId", 255), now=now)
    project = Project(id=new_id(), tenant_id=tenant.id, name=name, created_at=now, updated_at=now)
    projects.insert_project(tx, project)
    audit.record(
        tx, caller, "project.created", now=now, project_id=project.id, tenant_id=tenant.id, name=name
    )
    return project, tenant.account


def _checked(text: str, field: str, maximum: int) -> str:
    try:
        return display_name(text, maximum=maximum)
    except InvalidReference as error:
        raise Invalid("the project is not valid", details=(Fault(field, str(error)),)) from error


def _tenant_for(tx: Session, caller: Caller, account: str, *, now: datetime) -> Tenant:
    found = tenants.find_tenant(tx, account)
    if found is not None and caller.may_see_tenant(found.id):
        caller.require_in(found.id)
        return found
    if not caller.sees_all_tenants:
        raise Denied("this account is not yours")
    return tenants.ensure_tenant(tx, account, now=now)
