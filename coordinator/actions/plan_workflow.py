"""Check a workflow's steps against what the project may use."""

from collections.abc import Collection

from sqlmodel import Session

from coordinator.errors import Invalid
from coordinator.site import Site
from coordinator.store import images
from coordinator.tables import DockerImage, Project
from shared.faults import Fault
from shared.plan import InvalidPlan, Plan, plan_steps
from shared.references import InvalidReference, display_name


def plan_workflow(
    tx: Session, site: Site, project: Project, *, name: object, steps: object
) -> tuple[Plan, dict[str, DockerImage]]:
    """The plan and the image behind each slug, or Invalid with every fault."""
    found: dict[str, DockerImage] = {}

    def known_images(slugs: Collection[str]) -> Collection[str]:
        found.update(
            images.find_images(
                tx, slugs, tenant_id=project.tenant_id, default_tenant_id=site.default_tenant_id
            )
        )
        return found

    faults = _name_faults(name)
    try:
        plan = plan_steps(steps, known_images=known_images)
    except InvalidPlan as error:
        raise Invalid("the workflow is not valid", details=(*faults, *error.faults)) from error
    if faults:
        raise Invalid("the workflow is not valid", details=faults)
    return plan, found


def _name_faults(name: object) -> tuple[Fault, ...]:
    if not isinstance(name, str):
        return (Fault("name", "must be a string" if name is not None else "is required"),)
    try:
        display_name(name)
    except InvalidReference as error:
        return (Fault("name", str(error)),)
    return ()
