"""The audit trail: rows are inserted, never changed."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import bindparam, func, insert
from sqlmodel import Session, col, select

from coordinator.rules.access import Caller
from coordinator.store.prepared import Prepared
from coordinator.tables import AuditLog, Project, table_of
from shared.ids import new_id

_AUDIT = table_of(AuditLog)
_PROJECTS = table_of(Project)
_SEAL = {"chain", "seq", "hash"}  # these come later, in the order in which transactions have ended
_SAID = {
    column.name: bindparam(column.name, type_=column.type) for column in _AUDIT.c if column.name not in _SEAL
}
_OF_PROJECT = select(_PROJECTS.c.tenant_id).where(_PROJECTS.c.id == _SAID["project_id"]).scalar_subquery()
# who speaks for no tenant, such as a runner or the coordinator itself, acts in that of the project
_INSERT = Prepared(
    insert(_AUDIT).values({**_SAID, "tenant_id": func.coalesce(_SAID["tenant_id"], _OF_PROJECT)})
)


def record(
    tx: Session,
    caller: Caller,
    action: str,
    *,
    now: datetime,
    project_id: str | None = None,
    tenant_id: str | None = None,
    **details: Any,
) -> None:
    """Write down who did what, in the transaction of the change itself."""
    row = _row(caller, action, project_id, tenant_id or caller.tenant_id, details, now)
    _INSERT.run(tx, row)


def record_step(
    tx: Session, caller: Caller, action: str, step: Any, *, now: datetime, **details: Any
) -> None:
    """`record` for what happened to the current attempt of a step."""
    record_each_step(tx, caller, action, [(step, details)], now=now)


def record_each_step(
    tx: Session, caller: Caller, action: str, happened: Sequence[tuple[Any, dict[str, Any]]], *, now: datetime
) -> None:
    """`record_step` for each of these steps and details, all at once."""
    rows = [
        _row(
            caller,
            action,
            step.project_id,
            caller.tenant_id or step.tenant_id,
            {"stepId": step.id, "attempt": step.attempt, **details},
            now,
        )
        for step, details in happened
    ]
    if rows:
        _INSERT.run_each(tx, rows)


def _row(
    caller: Caller,
    action: str,
    project_id: str | None,
    tenant_id: str | None,
    details: dict[str, Any],
    now: datetime,
) -> dict[str, Any]:
    return {
        "id": new_id(),
        "tenant_id": tenant_id,
        "project_id": project_id,
        "action": action,
        "actor": caller.actor,
        "address": caller.address,
        "details": {key: value for key, value in details.items() if value is not None},
        "created_at": now,
    }


def list_records(
    tx: Session, caller: Caller, *, project_id: str | None, action: str | None, limit: int, offset: int
) -> tuple[list[AuditLog], int]:
    """A page of what the caller may see, newest first, and how many there are."""
    conditions: list[Any] = []
    if not caller.sees_all_tenants:
        conditions.append(col(AuditLog.tenant_id) == caller.tenant_id)
    if project_id is not None:
        conditions.append(col(AuditLog.project_id) == project_id)
    if action is not None:
        conditions.append(col(AuditLog.action) == action)
    rows = tx.exec(
        select(AuditLog).where(*conditions).order_by(col(AuditLog.id).desc()).limit(limit).offset(offset)
    ).all()
    total = tx.exec(select(func.count()).select_from(AuditLog).where(*conditions)).one()
    return list(rows), int(total)
