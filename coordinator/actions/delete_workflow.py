"""A workflow goes."""

from datetime import datetime

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import audit, projects, workflows


def delete_workflow(tx: Session, caller: Caller, project_id: str, workflow_id: str, *, now: datetime) -> None:
    """Hide the workflow; its builds stay, and go on if they run."""
    project = projects.get_project(tx, caller, project_id)
    workflow = workflows.get_workflow(tx, project.id, workflow_id)
    workflow.deleted_at = now
    tx.add(workflow)
    workflows.delete_image_uses(tx, workflow.id)
    if project.default_workflow_id == workflow.id:
        projects.change_project(tx, project, {"default_workflow_id": None}, now=now)
    audit.record(
        tx,
        caller,
        "workflow.deleted",
        now=now,
        project_id=project.id,
        tenant_id=project.tenant_id,
        workflowId=workflow.id,
    )
