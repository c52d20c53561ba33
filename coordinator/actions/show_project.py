"""One project."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import projects, tenants
from coordinator.tables import Project


def show_project(tx: Session, caller: Caller, project_id: str) -> tuple[Project, str]:
    """The project and its account."""
    project = projects.get_project(tx, caller, project_id)
    return project, tenants.get_account(tx, project.tenant_id)
