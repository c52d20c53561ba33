"""Workflows and their versions."""

from datetime import datetime
from typing import Any

from sqlalchemy import delete
from sqlmodel import Session, col, select

from coordinator.errors import NotFound
from coordinator.tables import Workflow, WorkflowImage, WorkflowVersion, table_of


def insert_version(
    tx: Session, workflow: Workflow, steps: list[dict[str, Any]], image_ids: set[str], *, now: datetime
) -> None:
    """Store the workflow with `steps` as its current version."""
    tx.add(workflow)
    tx.flush()
    tx.add(WorkflowVersion(workflow_id=workflow.id, version=workflow.version, steps=steps, created_at=now))
    uses = table_of(WorkflowImage)
    tx.connection().execute(delete(uses).where(uses.c.workflow_id == workflow.id))
    for image_id in sorted(image_ids):
        tx.add(WorkflowImage(workflow_id=workflow.id, image_id=image_id))
    tx.flush()


def delete_image_uses(tx: Session, workflow_id: str) -> None:
    uses = table_of(WorkflowImage)
    tx.connection().execute(delete(uses).where(uses.c.workflow_id == workflow_id))


def delete_uses_of_image(tx: Session, image_id: str) -> None:
    uses = table_of(WorkflowImage)
    tx.connection().execute(delete(uses).where(uses.c.image_id == image_id))


def list_workflows(tx: Session, project_id: str) -> list[Workflow]:
    statement = (
        select(Workflow)
        .where(col(Workflow.project_id) == project_id, col(Workflow.deleted_at).is_(None))
        .order_by(col(Workflow.id))
    )
    return list(tx.exec(statement).all())


def get_workflow(tx: Session, project_id: str, workflow_id: str) -> Workflow:
    workflow = tx.get(Workflow, workflow_id)
    if workflow is None or workflow.deleted_at is not None or workflow.project_id != project_id:
        raise NotFound("no such workflow")
    return workflow


def get_steps(tx: Session, workflow: Workflow) -> list[dict[str, Any]]:
    """The steps of the current version, as planned."""
    version = tx.get(WorkflowVersion, (workflow.id, workflow.version))
    if version is None:
        raise NotFound("no such workflow version")
    return version.steps
