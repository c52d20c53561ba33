"""A workflow gets a new version."""

from collections.abc import Sequence
from datetime import datetime

from sqlmodel import Session

from coordinator.actions.plan_workflow import plan_workflow, store_version
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, projects, workflows
from coordinator.tables import Workflow


def change_workflow(
    tx: Session,
    site: Site,
    caller: Caller,
    project_id: str,
    workflow_id: str,
    *,
    name: object,
    steps: object,
    unknown: Sequence[str] = (),
    now: datetime,
) -> Workflow:
    """Replace name and steps by a new version. Builds made before keep the version they were made with."""
    project = projects.get_project(tx, caller, project_id)
    workflow = workflows.get_workflow(tx, project.id, workflow_id)
    plan, images = plan_workflow(tx, site, project, name=name, steps=steps, unknown=unknown)
    workflow.name = str(name)
    workflow.version += 1
    workflow.updated_at = now
    store_version(tx, workflow, plan, images, now=now)
    audit.record(
        tx,
        caller,
        "workflow.changed",
        now=now,
        project_id=project.id,
        tenant_id=project.tenant_id,
        workflowId=workflow.id,
        version=workflow.version,
    )
    return workflow
