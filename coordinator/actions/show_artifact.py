"""One artifact, for download."""

from typing import Any

from sqlmodel import Session

from coordinator.actions.refuse_expired import has_expired, refuse_expired
from coordinator.actions.show_build import get_visible_build
from coordinator.errors import Expired, NotFound
from coordinator.rules.access import Caller
from coordinator.store import artifacts, steps


def show_artifact(tx: Session, caller: Caller, artifact_id: str) -> Any:
    try:
        artifact = artifacts.get_artifact(tx, artifact_id)
    except NotFound:
        refuse_expired(tx, caller, artifact_id)
        raise
    try:
        build = get_visible_build(tx, caller, artifact.build_id)
    except Expired as error:
        raise Expired("this artifact has expired or was deleted") from error
    except NotFound as error:
        raise type(error)("no such artifact") from error
    if has_expired(build, steps.get_step(tx, artifact.step_id).round):
        raise Expired("this artifact has expired")
    return artifact
