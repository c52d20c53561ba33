"""The workflows of a project."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import projects, workflows
from coordinator.tables import Workflow


def list_workflows(tx: Session, caller: Caller, project_id: str) -> list[Workflow]:
    project = projects.get_project(tx, caller, project_id)
    return workflows.list_workflows(tx, project.id)
