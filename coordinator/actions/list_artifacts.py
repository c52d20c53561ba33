"""The artifacts of a build."""

from typing import Any

from sqlmodel import Session

from coordinator.actions.show_build import get_visible_build
from coordinator.rules.access import Caller
from coordinator.store import artifacts


def list_artifacts(tx: Session, caller: Caller, build_id: str) -> list[Any]:
    build = get_visible_build(tx, caller, build_id)
    return artifacts.list_artifacts(tx, build.id)
