"""Projects; those that were deleted are as if they had never been."""

from datetime import datetime
from typing import Any

from sqlalchemy import func, update
from sqlalchemy import select as core_select
from sqlmodel import Session, col, select

from coordinator.errors import Foreign, NotFound
from coordinator.rules.access import Caller
from coordinator.tables import Build, Project, table_of
from shared.states import FINAL_BUILD_STATES

PROJECTS = table_of(Project)


def insert_project(tx: Session, project: Project) -> None:
    tx.add(project)
    tx.flush()


def get_project(tx: Session, caller: Caller, project_id: str) -> Project:
    """The project, if the caller may see it; not yours is the same as not there.

    Denied for one that the caller may see and not do this with.
    """
    project = tx.get(Project, project_id)
    if project is None or project.deleted_at is not None:
        raise NotFound("no such project")
    if not caller.may_see_tenant(project.tenant_id):
        raise Foreign("no such project")
    caller.require_in(project.tenant_id)
    return project


def lock_project(tx: Session, project_id: str) -> None:
    """Hold the project until the transaction ends: no build is made in it meanwhile.

    NotFound for one that was deleted while its row was waited for.
    """
    statement = core_select(PROJECTS.c.id).where(PROJECTS.c.id == project_id, PROJECTS.c.deleted_at.is_(None))
    # a build that moves twice in one transaction looks at the key of its project, which stays as it is: were
    # it to wait here, who holds the project and wants the build would wait for it as well
    if tx.connection().execute(statement.with_for_update(key_share=True)).first() is None:
        raise NotFound("no such project")


def list_projects(tx: Session, tenant_id: str) -> list[Project]:
    """All projects of a tenant, oldest first."""
    statement = (
        select(Project)
        .where(col(Project.tenant_id) == tenant_id, col(Project.deleted_at).is_(None))
        .order_by(col(Project.id))
    )
    return list(tx.exec(statement).all())


def page_projects(tx: Session, tenant_id: str, *, limit: int, offset: int) -> tuple[list[Project], int]:
    """Some projects of a tenant, oldest first, and how many it has."""
    its = (col(Project.tenant_id) == tenant_id, col(Project.deleted_at).is_(None))
    statement = select(Project).where(*its).order_by(col(Project.id)).limit(limit).offset(offset)
    total = tx.exec(select(func.count()).select_from(Project).where(*its)).one()
    return list(tx.exec(statement).all()), int(total)


def change_project(tx: Session, project: Project, changes: dict[str, Any], *, now: datetime) -> None:
    for field, value in changes.items():
        setattr(project, field, value)
    project.updated_at = now
    tx.add(project)
    tx.flush()


def take_build_number(tx: Session, project_id: str) -> int:
    """The next number of this project, without gaps: it is taken in the build's own transaction."""
    statement = (
        update(PROJECTS)
        .where(PROJECTS.c.id == project_id, PROJECTS.c.deleted_at.is_(None))
        .values(last_build_number=PROJECTS.c.last_build_number + 1)
        .returning(PROJECTS.c.last_build_number)
    )
    number = tx.connection().execute(statement).scalar_one_or_none()
    if number is None:
        raise NotFound("no such project")
    return int(number)


def count_unfinished_builds(tx: Session, project_id: str) -> int:
    statement = select(func.count()).where(
        col(Build.project_id) == project_id,
        col(Build.state).not_in(FINAL_BUILD_STATES),
        col(Build.expired_at).is_(None),
    )
    return int(tx.exec(statement).one())
