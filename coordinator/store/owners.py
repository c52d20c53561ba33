"""Whose things are: of ids, however they came to be asked for, the tenants they belong to."""

from collections.abc import Collection

from sqlalchemy import select, union_all
from sqlmodel import Session

from coordinator.access_tables import ApiToken, EnrolmentToken
from coordinator.store.dialect import listed
from coordinator.tables import (
    Artifact,
    Build,
    Cancel,
    DockerImage,
    Project,
    Runner,
    Step,
    Tenant,
    Workflow,
    table_of,
)

_PROJECTS = table_of(Project)
_BUILDS = table_of(Build)
_OWNED = [
    _PROJECTS,
    *(table_of(row) for row in (Tenant, DockerImage, ApiToken, EnrolmentToken, Runner)),
]
_IN_PROJECTS = [table_of(Workflow), _BUILDS, table_of(Step)]
_IN_BUILDS = [table_of(Artifact), table_of(Cancel)]


def find_owners(tx: Session, ids: Collection[str]) -> dict[str, str | None]:
    """The tenant of each of these ids, None for what is the operator's; what is not there is left out."""
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
    of_builds = [
        select(table.c.id, _PROJECTS.c.tenant_id)
        .join(_BUILDS, _BUILDS.c.id == table.c.build_id)
        .join(_PROJECTS, _PROJECTS.c.id == _BUILDS.c.project_id)
        .where(table.c.id.in_(wanted))
        for table in _IN_BUILDS
    ]
    rows = tx.connection().execute(union_all(*of_tenants, *of_projects, *of_builds))
    return {row[0]: row[1] for row in rows}
