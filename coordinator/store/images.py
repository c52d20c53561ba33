"""Docker images by slug: one's own first, then those common to all, then public ones."""

from collections.abc import Collection

from sqlalchemy import func
from sqlmodel import Session, col, or_, select

from coordinator.errors import Foreign, NotFound
from coordinator.rules.access import Caller
from coordinator.store.dialect import insert_if_absent
from coordinator.tables import DockerImage, Workflow, WorkflowImage, table_of


def insert_image(tx: Session, image: DockerImage) -> bool:
    """False when the tenant has this slug already."""
    return insert_if_absent(tx, table_of(DockerImage), image.model_dump())


def list_images(tx: Session, caller: Caller, *, public: bool | None) -> list[DockerImage]:
    """The images this caller may use, oldest first; `public` narrows the list."""
    statement = select(DockerImage).order_by(col(DockerImage.id))
    if not caller.sees_all_tenants:
        statement = statement.where(
            or_(col(DockerImage.tenant_id) == caller.tenant_id, col(DockerImage.public).is_(True))
        )
    if public is not None:
        statement = statement.where(col(DockerImage.public).is_(public))
    return list(tx.exec(statement).all())


def get_image(tx: Session, caller: Caller, image_id: str) -> DockerImage:
    """The image, if it belongs to the caller's tenant."""
    image = tx.get(DockerImage, image_id)
    if image is None:
        raise NotFound("no such docker image")
    if not caller.may_see_tenant(image.tenant_id):
        raise Foreign("no such docker image")
    caller.require_in(image.tenant_id)
    return image


def find_images(
    tx: Session, slugs: Collection[str], *, tenant_id: str, common_tenant_id: str | None
) -> dict[str, DockerImage]:
    """The image behind each slug that a project of this tenant may use."""
    owners = {tenant_id} | ({common_tenant_id} if common_tenant_id else set())
    statement = select(DockerImage).where(
        col(DockerImage.slug).in_(slugs),
        or_(col(DockerImage.tenant_id).in_(owners), col(DockerImage.public).is_(True)),
    )

    def distance(image: DockerImage) -> tuple[int, str]:
        nearness = {tenant_id: 0, common_tenant_id: 1}.get(image.tenant_id, 2)
        return nearness, image.id

    nearest: dict[str, DockerImage] = {}
    for image in sorted(tx.exec(statement).all(), key=distance):
        nearest.setdefault(image.slug, image)
    return nearest


def count_uses(tx: Session, image_id: str) -> int:
    """How many workflows use this image now."""
    statement = (
        select(func.count())
        .select_from(WorkflowImage)
        .join(Workflow, col(Workflow.id) == col(WorkflowImage.workflow_id))
        .where(col(WorkflowImage.image_id) == image_id, col(Workflow.deleted_at).is_(None))
    )
    return int(tx.exec(statement).one())
