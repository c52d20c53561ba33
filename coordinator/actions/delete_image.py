"""A docker image goes."""

from datetime import datetime

from sqlmodel import Session

from coordinator.errors import InUse
from coordinator.rules.access import Caller
from coordinator.store import audit, images, workflows


def delete_image(tx: Session, caller: Caller, image_id: str, *, now: datetime) -> None:
    """Remove the image; refused while a workflow uses it. Builds keep the copy they were made with."""
    image = images.get_image(tx, caller, image_id)
    uses = images.count_uses(tx, image.id)
    if uses:
        raise InUse(f"{uses} workflows use this docker image")
    workflows.delete_uses_of_image(tx, image.id)
    tx.delete(image)
    tx.flush()
    audit.record(
        tx, caller, "image.deleted", now=now, tenant_id=image.tenant_id, imageId=image.id, slug=image.slug
    )
