"""A new workflow of a project."""

from collections.abc import Sequence
from datetime import datetime

from sqlmodel import Session

from coordinator.actions.plan_workflow import plan_workflow, store_version
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, projects
from coordinator.tables import Workflow
from shared.ids import new_id


def create_workflow(
    tx: Session,
    site: Site,
    caller: Caller,
    project_id: str,
    *,
    name: object,
    steps: object,
    unknown: Sequence[str] = (),
    now: datetime,
) -> Workflow:
    """Plan the steps and store them as version 1, or refuse them with every fault."""
    project = projects.get_project(tx, caller, project_id)
    plan, images = plan_workflow(tx, site, project, name=name, steps=steps, unknown=unknown)
    workflow = Workflow(
        id=new_id(), project_id=project.id, name=str(name), version=1, created_at=now, updated_at=now
    )
    store_version(tx, workflow, plan, images, now=now)
    audit.record(
        tx,
        caller,
        "workflow.created",
        now=now,
        project_id=project.id,
        tenant_id=project.tenant_id,
        workflowId=workflow.id,
        steps=len(plan.steps),
    )
    return workflow
