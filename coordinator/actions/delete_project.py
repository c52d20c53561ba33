"""A project goes, with everything in it."""

from datetime import datetime

from sqlmodel import Session

from coordinator.errors import InUse
from coordinator.rules.access import Caller
from coordinator.store import audit, project_secrets, projects


def delete_project(tx: Session, caller: Caller, project_id: str, *, now: datetime) -> None:
    """Hide the project and all below it; refused while one of its builds has not ended."""
    project = projects.get_project(tx, caller, project_id)
    projects.lock_project(tx, project.id)
    unfinished = projects.count_unfinished_builds(tx, project.id)
    if unfinished:
        raise InUse(f"{unfinished} builds of this project have not ended")
    project_secrets.delete_all(tx, project.id)
    projects.change_project(tx, project, {"deleted_at": now}, now=now)
    audit.record(tx, caller, "project.deleted", now=now, project_id=project.id, tenant_id=project.tenant_id)
