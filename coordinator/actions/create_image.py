"""A new docker image for workflows to name."""

from datetime import datetime

from sqlmodel import Session

from coordinator.errors import AlreadyExists, Invalid
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, images
from coordinator.tables import DockerImage
from shared.faults import Fault
from shared.ids import new_id
from shared.references import InvalidReference, image_reference
from shared.references import slug as image_slug


def create_image(
    tx: Session, site: Site, caller: Caller, *, slug: str, image_url: str, public: bool, now: datetime
) -> DockerImage:
    """Make an image under a slug that is unique for its tenant."""
    faults = []
    try:
        image_slug(slug)
    except InvalidReference as error:
        faults.append(Fault("slug", str(error)))
    try:
        image_reference(image_url)
    except InvalidReference as error:
        faults.append(Fault("imageUrl", str(error)))
    if faults:
        raise Invalid("the docker image is not valid", details=tuple(faults))
    tenant_id = caller.tenant_id or site.default_tenant_id
    assert tenant_id is not None  # noqa: S101 - the start makes the default tenant
    image = DockerImage(
        id=new_id(), tenant_id=tenant_id, slug=slug, image_url=image_url, public=public, created_at=now
    )
    if not images.insert_image(tx, image):
        raise AlreadyExists("a docker image with this slug already exists")
    audit.record(
        tx, caller, "image.created", now=now, tenant_id=tenant_id, imageId=image.id, slug=slug, url=image_url
    )
    return image
