"""Who asks for something that was deleted, by retention or by hand, hears so, if it was theirs to see."""

from sqlmodel import Session

from coordinator.errors import Expired, NotFound
from coordinator.rules.access import Caller
from coordinator.store import projects, retention
from coordinator.tables import Build


def refuse_expired(tx: Session, caller: Caller, thing_id: str) -> None:
    """Expired for what has been there and was not kept; nothing happens for ids that never were."""
    tombstone = retention.find_tombstone(tx, thing_id)
    if tombstone is None:
        return
    try:
        projects.get_project(tx, caller, tombstone.project_id)
    except NotFound:
        return  # as if it had never been
    raise Expired(f"this {tombstone.kind} has expired or was deleted")


def has_expired(build: Build, step_round: int) -> bool:
    """True when the artifacts of steps of this round are marked: rows may still be there for a moment."""
    return step_round <= build.artifacts_expired_round
