"""Rows of what was marked go, a few at a time."""

from datetime import datetime

from sqlmodel import Session

from coordinator.rules.retention import Part
from coordinator.store import retention

ARTIFACTS_AT_ONCE = 500
APPENDS_AT_ONCE = 2000


def delete_expired(tx: Session, build_id: str, part: Part, *, now: datetime) -> int:
    """The next rows of this part of a marked build; 0 when none is left. A build goes as the last."""
    if part is Part.ARTIFACTS:
        return retention.delete_artifacts(tx, build_id, limit=ARTIFACTS_AT_ONCE, now=now)
    if part is Part.LOGS:
        return retention.delete_appends(tx, build_id, limit=APPENDS_AT_ONCE)
    return int(retention.delete_build(tx, build_id, now=now))
