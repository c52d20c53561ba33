"""The audit trail, newest first."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import audit
from coordinator.tables import AuditLog


def list_audit_logs(
    tx: Session, caller: Caller, *, project_id: str | None, action: str | None, limit: int, offset: int
) -> tuple[list[AuditLog], int]:
    return audit.list_records(tx, caller, project_id=project_id, action=action, limit=limit, offset=offset)
