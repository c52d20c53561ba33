"""The projects of the tenant that a request is about."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import projects
from coordinator.tables import Project


def list_own_projects(tx: Session, caller: Caller, *, limit: int, offset: int) -> tuple[list[Project], int]:
    """A page of them, oldest first, and how many there are."""
    return projects.page_projects(tx, caller.tenant_id or "", limit=limit, offset=offset)
