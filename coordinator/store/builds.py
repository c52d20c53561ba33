"""Builds: their rows, their lock, their moves."""

import functools
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import func, update
from sqlalchemy import select as core_select
from sqlalchemy.engine import Row
from sqlmodel import Session, col, select

from coordinator.errors import Conflict, NotFound
from coordinator.rules.transitions import BUILD_TRANSITIONS, BuildEvent
from coordinator.store.prepared import Found, Prepared
from coordinator.store.statements import among, as_new, given, given_any, new_values
from coordinator.tables import Build, Step, table_of
from shared.states import FINAL_BUILD_STATES

BUILDS = table_of(Build)
_STEPS = table_of(Step)


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
        .where(col(Build.project_id) == project_id, col(Build.expired_at).is_(None))
        .order_by(col(Build.number).desc())
        .limit(limit)
        .offset(offset)
    ).all()
    total = tx.exec(
        select(func.count()).where(col(Build.project_id) == project_id, col(Build.expired_at).is_(None))
    ).one()
    return list(rows), int(total)


_IS_IT = BUILDS.c.id == given(BUILDS.c.id)
_LOCK = Prepared(
    core_select(
        BUILDS.c.id,
        BUILDS.c.state,
        BUILDS.c.reason,
        BUILDS.c.round,
        BUILDS.c.cancel_requested_at,
        BUILDS.c.project_id,
    )
    .where(_IS_IT)
    .with_for_update(key_share=True)
)
_LOCK_OF = Prepared(
    core_select(BUILDS.c.id)
    .where(
        BUILDS.c.id
        == core_select(_STEPS.c.build_id).where(_STEPS.c.id == given(_STEPS.c.id)).scalar_subquery()
    )
    .with_for_update(key_share=True)
)
_LOCK_EACH_OF = Prepared(
    core_select(BUILDS.c.id)
    .where(BUILDS.c.id.in_(core_select(_STEPS.c.build_id).where(given_any(_STEPS.c.id))))
    .order_by(BUILDS.c.id)
    .with_for_update(key_share=True)
)
_BY_ID = Prepared(core_select(BUILDS).where(given_any(BUILDS.c.id)))
_BEGIN_SOURCES, _BEGIN_TARGET = BUILD_TRANSITIONS[BuildEvent.BEGIN]
_BEGIN = Prepared(
    update(BUILDS)
    .where(given_any(BUILDS.c.id), among(BUILDS.c.state, _BEGIN_SOURCES))
    .values(state=_BEGIN_TARGET, **new_values(BUILDS, ["started_at", "updated_at"]))
)


def lock_build(tx: Session, build_id: str) -> Found:
    """Hold the build until the transaction ends: always before any of its steps is settled.

    Rows that only refer to it can be written meanwhile: who changes one of its steps twice asks whether
    there is such a build, and would wait for who holds it and waits for the step.
    """
    row = _LOCK.first(tx, {"the_id": build_id})
    if row is None:
        raise NotFound("no such build")
    return row


def lock_builds_of(tx: Session, step_ids: Sequence[str]) -> None:
    """`lock_build_of` for several steps: each build once, in the order of their ids."""
    _LOCK_EACH_OF.all(tx, {"any_id": step_ids})


def lock_build_of(tx: Session, step_id: str) -> None:
    """`lock_build` for who knows one of its steps only; nothing where there is no such step."""
    _LOCK_OF.first(tx, {"the_id": step_id})


def move_build(tx: Session, build_id: str, event: BuildEvent, *, now: datetime, **values: Any) -> bool:
    """Apply `event` if the build stands where it may; False when it does not."""
    which = {"the_id": build_id}
    values["updated_at"] = now
    return _move(event, tuple(values)).run(tx, which | as_new(values)) == 1


@functools.cache
def _move(event: BuildEvent, names: tuple[str, ...]) -> Prepared:
    sources, target = BUILD_TRANSITIONS[event]
    return Prepared(
        update(BUILDS)
        .where(_IS_IT, among(BUILDS.c.state, sources))
        .values(state=target, **new_values(BUILDS, names))
    )


def begin_builds(tx: Session, build_ids: set[str], *, now: datetime) -> None:
    """The first claim of a build makes it run."""
    moments = as_new({"started_at": now, "updated_at": now})
    _BEGIN.run(tx, {"any_id": sorted(build_ids)} | moments)


def bind_commit(tx: Session, build_id: str, commit: str, *, now: datetime) -> tuple[str, bool]:
    """Let the first commit that is named bind the build; returns the one that binds and if it is new."""
    statement = (
        update(BUILDS)
        .where(BUILDS.c.id == build_id, BUILDS.c.commit_hash.is_(None))
        .values(commit_hash=commit, updated_at=now)
    )
    is_new = tx.connection().execute(statement).rowcount == 1
    bound = tx.connection().execute(core_select(BUILDS.c.commit_hash).where(BUILDS.c.id == build_id))
    return str(bound.scalar_one()), is_new


def list_builds_by_id(tx: Session, build_ids: set[str]) -> dict[str, Found]:
    return {row.id: row for row in _BY_ID.all(tx, {"any_id": sorted(build_ids)})}


def require_unfinished(build: Row[Any]) -> None:
    if build.state in FINAL_BUILD_STATES:
        raise Conflict("the build has ended")
