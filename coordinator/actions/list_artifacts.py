"""The artifacts of a build."""

from typing import Any

from sqlmodel import Session

from coordinator.actions.show_build import get_visible_build
from coordinator.rules.access import Caller
from coordinator.store import rounds


def list_artifacts(tx: Session, caller: Caller, build_id: str) -> list[Any]:
    """What the build has to show now; of a step that ran again only the latest outputs."""
    build = get_visible_build(tx, caller, build_id)
    return rounds.list_latest_artifacts(tx, build.id, after_round=build.artifacts_expired_round)
