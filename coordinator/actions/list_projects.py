"""The projects of an account."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import projects, tenants
from coordinator.tables import Project


def list_projects(tx: Session, caller: Caller, *, account: str) -> list[tuple[Project, str]]:
    """Each project with its account; an account that is unknown, or not the caller's, has none."""
    tenant = tenants.find_tenant(tx, account)
    if tenant is None or not caller.may_see_tenant(tenant.id):
        return []
    caller.require_in(tenant.id)
    return [(project, tenant.account) for project in projects.list_projects(tx, tenant.id)]
