"""Builds: their rows, their lock, their moves."""

from datetime import datetime
from typing import Any

from sqlalchemy import func, update
from sqlalchemy import select as core_select
from sqlalchemy.engine import Row
from sqlmodel import Session, col, select

from coordinator.errors import Conflict, NotFound
from coordinator.rules.transitions import BUILD_TRANSITIONS, BuildEvent
from coordinator.tables import Build, table_of
from shared.states import FINAL_BUILD_STATES

BUILDS = table_of(Build)


def insert_build(tx: Session, build: Build) -> None:
    tx.add(build)
    tx.flush()


def get_build(tx: Session, build_id: str) -> Build:
    build = tx.get(Build, build_id)
    if build is None:
        raise NotFound("no such build")
    return build


def list_builds(tx: Session, project_id: str, *, limit: int, offset: int) -> tuple[list[Build], int]:
    """A page of the project's builds, newest first, and how many there are."""
    rows = tx.exec(
        select(Build)
        .where(col(Build.project_id) == project_id)
        .order_by(col(Build.number).desc())
        .limit(limit)
        .offset(offset)
    ).all()
    total = tx.exec(select(func.count()).where(col(Build.project_id) == project_id)).one()
    return list(rows), int(total)


_LOCK = core_select(BUILDS.c.id, BUILDS.c.state, BUILDS.c.cancel_requested_at, BUILDS.c.project_id)


def lock_build(tx: Session, build_id: str) -> Any:
    """Hold the build until the transaction ends: always before any of its steps is settled."""
    row = tx.connection().execute(_LOCK.where(BUILDS.c.id == build_id).with_for_update()).one_or_none()
    if row is None:
        raise NotFound("no such build")
    return row


def move_build(tx: Session, build_id: str, event: BuildEvent, **values: Any) -> bool:
    """Apply `event` if the build stands where it may; False when it does not."""
    sources, target = BUILD_TRANSITIONS[event]
    statement = (
        update(BUILDS)
        .where(BUILDS.c.id == build_id, BUILDS.c.state.in_(sources))
        .values(state=target, **values)
    )
    return tx.connection().execute(statement).rowcount == 1


def begin_builds(tx: Session, build_ids: set[str], *, now: datetime) -> None:
    """The first claim of a build makes it run."""
    sources, target = BUILD_TRANSITIONS[BuildEvent.BEGIN]
    statement = (
        update(BUILDS)
        .where(BUILDS.c.id.in_(build_ids), BUILDS.c.state.in_(sources))
        .values(state=target, started_at=now)
    )
    tx.connection().execute(statement)


def bind_commit(tx: Session, build_id: str, commit: str) -> str:
    """Let the first commit that is named bind the build; returns the one that binds."""
    statement = (
        update(BUILDS)
        .where(BUILDS.c.id == build_id, BUILDS.c.commit_hash.is_(None))
        .values(commit_hash=commit)
    )
    tx.connection().execute(statement)
    bound = tx.connection().execute(core_select(BUILDS.c.commit_hash).where(BUILDS.c.id == build_id))
    return str(bound.scalar_one())


def list_builds_by_id(tx: Session, build_ids: set[str]) -> dict[str, Row[Any]]:
    rows = tx.connection().execute(core_select(BUILDS).where(BUILDS.c.id.in_(build_ids))).all()
    return {row.id: row for row in rows}


def require_unfinished(build: Row[Any]) -> None:
    if build.state in FINAL_BUILD_STATES:
        raise Conflict("the build has ended")
