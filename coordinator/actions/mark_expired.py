"""Parts of builds are gone from this moment on; their rows and files follow."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.plan_retention import Weighed, weigh
from coordinator.rules.access import SYSTEM
from coordinator.rules.retention import Expiry, Part
from coordinator.store import audit, retention

AUDITED = {
    Part.ARTIFACTS: "artifacts.expired",
    Part.LOGS: "logs.expired",
    Part.BUILD: "build.expired",
}


def mark_expired(
    tx: Session, project: Any, part: Part, expiries: Sequence[Expiry], *, now: datetime
) -> list[Weighed]:
    """Mark this part of these builds; one that has changed since it was judged is left alone."""
    held = retention.lock_expiring(tx, part, expiries)
    if not held:
        return []
    weighed = weigh(tx, project.id, held)
    retention.mark(tx, [one.build_id for one in held], part, now=now)
    reasons = sorted({str(one.why) for one in held})
    audit.record(
        tx,
        SYSTEM,
        AUDITED[part],
        now=now,
        project_id=project.id,
        tenant_id=project.tenant_id,
        builds=len(weighed),
        numbers=[one.number for one in held],
        reasons=reasons,
        files=sum(one.files for one in weighed),
        bytes=sum(one.size for one in weighed),
    )
    return weighed
