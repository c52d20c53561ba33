"""One artifact, for download."""

from typing import Any

from sqlmodel import Session

from coordinator.actions.show_build import get_visible_build
from coordinator.errors import NotFound
from coordinator.rules.access import Caller
from coordinator.store import artifacts


def show_artifact(tx: Session, caller: Caller, artifact_id: str) -> Any:
    artifact = artifacts.get_artifact(tx, artifact_id)
    try:
        get_visible_build(tx, caller, artifact.build_id)
    except NotFound as error:
        raise NotFound("no such artifact") from error
    return artifact
