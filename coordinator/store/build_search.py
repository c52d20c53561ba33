"""Builds over all projects of a tenant: filtered, sorted, in pages."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, func
from sqlmodel import Session, col, select

from coordinator.tables import Build, Project
from shared.states import BuildState

SortBy = Literal["created_at", "updated_at", "build_number"]
_COLUMNS: dict[SortBy, Any] = {
    "created_at": col(Build.created_at),
    "updated_at": col(Build.updated_at),
    "build_number": col(Build.number),
}


@dataclass(frozen=True)
class Search:
    """Which builds, in which order, and which of them."""

    states: Collection[BuildState] | None = None
    project_id: str | None = None
    sort_by: SortBy = "created_at"
    is_descending: bool = True
    limit: int = 20
    offset: int = 0


def search_builds(tx: Session, tenant_id: str, search: Search) -> tuple[list[Build], int]:
    """A page of what is looked for, and how many there are; no build stands on two pages."""
    conditions = _conditions(tenant_id, search)
    order = [_COLUMNS[search.sort_by], col(Build.id)]  # the id decides between those that are equal
    rows = tx.exec(
        select(Build)
        .join(Project, col(Project.id) == col(Build.project_id))
        .where(*conditions)
        .order_by(*(column.desc() if search.is_descending else column.asc() for column in order))
        .limit(search.limit)
        .offset(search.offset)
    ).all()
    total = tx.exec(
        select(func.count())
        .select_from(Build)
        .join(Project, col(Project.id) == col(Build.project_id))
        .where(*conditions)
    ).one()
    return list(rows), int(total)


def _conditions(tenant_id: str, search: Search) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = [
        col(Project.tenant_id) == tenant_id,
        col(Project.deleted_at).is_(None),
        col(Build.expired_at).is_(None),
    ]
    if search.project_id is not None:
        conditions.append(col(Build.project_id) == search.project_id)
    if search.states is not None:
        conditions.append(col(Build.state).in_(sorted(search.states)))
    return conditions
