"""A secret of a project goes."""

from datetime import datetime

from sqlmodel import Session

from coordinator.errors import NotFound
from coordinator.rules.access import Caller
from coordinator.store import audit, project_secrets, projects


def delete_secret(tx: Session, caller: Caller, project_id: str, name: str, *, now: datetime) -> None:
    """No step is given it from now on; attempts that have it go on."""
    project = projects.get_project(tx, caller, project_id)
    projects.lock_project(tx, project.id)
    if not project_secrets.retire(tx, project.id, name, now=now):
        raise NotFound("no such secret")
    audit.record(
        tx,
        caller,
        "secret.deleted",
        now=now,
        project_id=project.id,
        tenant_id=project.tenant_id,
        name=name,
    )
