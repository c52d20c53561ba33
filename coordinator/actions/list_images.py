"""The docker images a caller may use."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import images
from coordinator.tables import DockerImage


def list_images(tx: Session, caller: Caller, *, public: bool | None) -> list[DockerImage]:
    """All of them, or only those that are (or are not) public."""
    return images.list_images(tx, caller, public=public)
