"""Whose things are: of ids, however they came to be asked for, the tenants they belong to."""

from collections.abc import Collection

from sqlalchemy import select, union_all
from sqlmodel import Session

from coordinator.store.dialect import listed
from coordinator.tables import Build, DockerImage, Project, Step, Tenant, Workflow, table_of

_PROJECTS = table_of(Project)
_OWNED = [table_of(Tenant), _PROJECTS, table_of(DockerImage)]
_IN_PROJECTS = [table_of(Workflow), table_of(Build), table_of(Step)]


def find_owners(tx: Session, ids: Collection[str]) -> dict[str, str]:
    """The tenant of each of these ids; none for what is not there."""
    wanted = listed(tx, ids)
    of_tenants = [
        select(table.c.id, table.c.get("tenant_id", table.c.id)).where(table.c.id.in_(wanted))
        for table in _OWNED
    ]
    of_projects = [
        select(table.c.id, _PROJECTS.c.tenant_id)
        .join(_PROJECTS, _PROJECTS.c.id == table.c.project_id)
        .where(table.c.id.in_(wanted))
        for table in _IN_PROJECTS
    ]
    rows = tx.connection().execute(union_all(*of_tenants, *of_projects))
    return {row[0]: row[1] for row in rows}
