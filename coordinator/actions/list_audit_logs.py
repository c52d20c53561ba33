"""The audit trail, newest first."""

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import audit, tenants
from coordinator.tables import AuditLog


def list_audit_logs(
    tx: Session, caller: Caller, *, project_id: str | None, action: str | None, limit: int, offset: int
) -> tuple[list[AuditLog], dict[str, str], int]:
    """A page of what the caller may see, the accounts of its tenants, and how many rows there are."""
    rows, total = audit.list_records(
        tx, caller, project_id=project_id, action=action, limit=limit, offset=offset
    )
    accounts = tenants.list_accounts(tx, {row.tenant_id for row in rows if row.tenant_id is not None})
    return rows, accounts, total
