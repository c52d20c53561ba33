"""Rows of what was marked go, a few at a time."""

from datetime import datetime

from sqlmodel import Session

from coordinator.rules.retention import Part
from coordinator.store import retention

ARTIFACTS_AT_ONCE = 500
APPENDS_AT_ONCE = 2000


def delete_expired(tx: Session, build_id: str, part: Part, *, now: datetime) -> bool:
    """The next rows of this part of a marked build; True when there may be more. A build goes as the last."""
    if part is Part.ARTIFACTS:
        gone = retention.delete_artifacts(tx, build_id, limit=ARTIFACTS_AT_ONCE, now=now)
        return gone == ARTIFACTS_AT_ONCE
    if part is Part.LOGS:
        return retention.delete_appends(tx, build_id, limit=APPENDS_AT_ONCE) == APPENDS_AT_ONCE
    retention.delete_build(tx, build_id, now=now)
    return False
