"""The runners this coordinator knows."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import runners
from coordinator.tables import Runner


def list_runners(tx: Session, caller: Caller) -> list[Runner]:
    """All runners; only callers that are bound to no tenant see them for now."""
    return runners.list_runners(tx) if caller.sees_all_tenants else []
