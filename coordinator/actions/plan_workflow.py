"""Check a workflow's steps against what the project may use."""

from collections.abc import Collection, Sequence
from datetime import datetime

from sqlmodel import Session

from coordinator.errors import Invalid
from coordinator.site import Site
from coordinator.store import images, workflows
from coordinator.tables import DockerImage, Project, Workflow
from shared.faults import Fault, join_path
from shared.plan import MAX_FAULTS, InvalidPlan, Plan, plan_steps
from shared.references import InvalidReference, display_name


def plan_workflow(
    tx: Session, site: Site, project: Project, *, name: object, steps: object, unknown: Sequence[str]
) -> tuple[Plan, dict[str, DockerImage]]:
    """The plan and the image behind each slug, or Invalid with every fault, `unknown` fields among them."""
    found: dict[str, DockerImage] = {}

    def known_images(slugs: Collection[str]) -> Collection[str]:
        found.update(
            images.find_images(tx, slugs, tenant_id=project.tenant_id, common_tenant_id=site.common_images)
        )
        return found

    strangers = (Fault(join_path([field]), "is not a known field") for field in unknown[:MAX_FAULTS])
    faults = (*strangers, *_name_faults(name))
    try:
        plan = plan_steps(steps, known_images=known_images)
    except InvalidPlan as error:
        raise Invalid("the workflow is not valid", details=(*faults, *error.faults)) from error
    if faults:
        raise Invalid("the workflow is not valid", details=faults)
    return plan, found


def store_version(
    tx: Session, workflow: Workflow, plan: Plan, found: dict[str, DockerImage], *, now: datetime
) -> None:
    """Store the workflow with the planned steps as its current version."""
    stored = [step.spec.model_dump(by_alias=True, mode="json") for step in plan.steps]
    used = {found[slug].id for slug in plan.image_slugs}
    workflows.insert_version(tx, workflow, stored, used, now=now)


def _name_faults(name: object) -> tuple[Fault, ...]:
    if not isinstance(name, str):
        return (Fault("name", "must be a string" if name is not None else "is required"),)
    try:
        display_name(name)
    except InvalidReference as error:
        return (Fault("name", str(error)),)
    return ()
