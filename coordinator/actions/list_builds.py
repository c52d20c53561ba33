"""The builds of a project, newest first."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import builds, projects
from coordinator.tables import Build


def list_builds(
    tx: Session, caller: Caller, project_id: str, *, limit: int, offset: int
) -> tuple[list[Build], int]:
    project = projects.get_project(tx, caller, project_id)
    return builds.list_builds(tx, project.id, limit=limit, offset=offset)
