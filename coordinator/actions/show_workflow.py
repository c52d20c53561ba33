"""One workflow with the steps of its current version."""

from typing import Any

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import projects, workflows
from coordinator.tables import Workflow


def show_workflow(
    tx: Session, caller: Caller, project_id: str, workflow_id: str
) -> tuple[Workflow, list[dict[str, Any]]]:
    project = projects.get_project(tx, caller, project_id)
    workflow = workflows.get_workflow(tx, project.id, workflow_id)
    return workflow, workflows.get_steps(tx, workflow)
