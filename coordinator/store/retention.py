"""Rows that expire: what a project holds, what is marked, and deleting it a few rows at a time.

A mark hides its thing from everybody at once; rows and files follow, and who is killed in between goes on
from the marks. A mark says up to which round: what the build makes when it runs again is of a later one and
stays, whatever any clock says. Bytes of blobs come last: first no artifact names them, then their row goes,
then the file.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    Table,
    and_,
    case,
    cast,
    delete,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    true,
    update,
)
from sqlmodel import Session

from coordinator.rules.retention import BuildFacts, Expiry, Part
from coordinator.store.dialect import listed
from coordinator.tables import (
    Artifact,
    Blob,
    Build,
    Cancel,
    LogAppend,
    Project,
    Row,
    Step,
    StepAttempt,
    Tombstone,
    table_of,
)
from shared.states import FINAL_BUILD_STATES, BuildState

ARTIFACTS = table_of(Artifact)
ATTEMPTS = table_of(StepAttempt)
APPENDS = table_of(LogAppend)
BLOBS = table_of(Blob)
BUILDS = table_of(Build)
CANCELS = table_of(Cancel)
PROJECTS = table_of(Project)
STEPS = table_of(Step)
TOMBSTONES = table_of(Tombstone)

_OF_KEPT = 2**31 - 1  # the number under which bytes count that no rule frees
_IS_ARTIFACT = and_(
    STEPS.c.build_id == BUILDS.c.id,
    ARTIFACTS.c.step_id == STEPS.c.id,
    ARTIFACTS.c.build_id == STEPS.c.build_id,
)
_IS_APPEND = and_(
    APPENDS.c.build_id == BUILDS.c.id, STEPS.c.id == APPENDS.c.step_id, STEPS.c.build_id == APPENDS.c.build_id
)
_KEEPS_ARTIFACTS = STEPS.c.round > BUILDS.c.artifacts_expired_round
_KEEPS_LOGS = STEPS.c.round > BUILDS.c.logs_expired_round
_HAS_ARTIFACTS = exists().where(_IS_ARTIFACT, _KEEPS_ARTIFACTS).correlate(BUILDS)
_HAS_LOGS = exists().where(_IS_APPEND, _KEEPS_LOGS).correlate(BUILDS)
_HAS_OLD_ARTIFACTS = exists().where(_IS_ARTIFACT, ~_KEEPS_ARTIFACTS).correlate(BUILDS)
_HAS_OLD_LOGS = exists().where(_IS_APPEND, ~_KEEPS_LOGS).correlate(BUILDS)
_HAS = {Part.ARTIFACTS: _HAS_ARTIFACTS, Part.LOGS: _HAS_LOGS, Part.BUILD: true()}


@dataclass(frozen=True)
class Usage:
    """What a build holds."""

    files: int = 0
    artifact_bytes: int = 0
    logs: int = 0
    log_bytes: int = 0


@dataclass(frozen=True)
class Marked:
    """A build of which something has been marked and is still there."""

    id: str
    is_whole: bool
    has_artifacts: bool
    has_logs: bool


# What there is


def list_projects(tx: Session, *, after: str = "", limit: int = 500) -> list[Any]:
    """All projects, those that were deleted too, in the order of their ids."""
    statement = select(PROJECTS).where(PROJECTS.c.id > after).order_by(PROJECTS.c.id).limit(limit)
    return list(tx.connection().execute(statement).all())


def list_facts(tx: Session, project_id: str) -> list[BuildFacts]:
    """The builds of a project that are still there, without what they weigh."""
    statement = select(
        BUILDS.c.id,
        BUILDS.c.number,
        BUILDS.c.workflow_id,
        BUILDS.c.branch,
        BUILDS.c.state,
        BUILDS.c.finished_at,
        _HAS_ARTIFACTS.label("has_artifacts"),
        _HAS_LOGS.label("has_logs"),
    ).where(BUILDS.c.project_id == project_id, BUILDS.c.expired_at.is_(None))
    return [
        BuildFacts(
            id=row.id,
            number=row.number,
            workflow_id=row.workflow_id,
            branch=row.branch,
            has_ended=row.state in FINAL_BUILD_STATES,
            has_succeeded=row.state == BuildState.SUCCEEDED,
            finished_at=row.finished_at,
            has_artifacts=bool(row.has_artifacts),
            has_logs=bool(row.has_logs),
        )
        for row in tx.connection().execute(statement)
    ]


def list_usage(tx: Session, project_id: str, build_ids: Collection[str] | None = None) -> dict[str, Usage]:
    """What the builds of a project hold, or only these of them; those that hold nothing are left out."""
    which: ColumnElement[bool] = BUILDS.c.project_id == project_id
    if build_ids is not None:
        which = and_(which, BUILDS.c.id.in_(sorted(build_ids)))
    files = (
        select(BUILDS.c.id, func.count(), func.sum(ARTIFACTS.c.size))
        .join(STEPS, STEPS.c.build_id == BUILDS.c.id)
        .join(ARTIFACTS, _IS_ARTIFACT)
        .where(which, _KEEPS_ARTIFACTS)
        .group_by(BUILDS.c.id)
    )
    logs = (
        select(BUILDS.c.id, func.count(), func.sum(ATTEMPTS.c.log_size))
        .join(STEPS, STEPS.c.build_id == BUILDS.c.id)
        .join(ATTEMPTS, ATTEMPTS.c.step_id == STEPS.c.id)
        .where(which, ATTEMPTS.c.log_size > 0, _KEEPS_LOGS)
        .group_by(BUILDS.c.id)
    )
    of_files = {row[0]: (int(row[1]), int(row[2])) for row in tx.connection().execute(files)}
    of_logs = {row[0]: (int(row[1]), int(row[2])) for row in tx.connection().execute(logs)}
    return {
        build_id: Usage(*of_files.get(build_id, (0, 0)), *of_logs.get(build_id, (0, 0)))
        for build_id in of_files.keys() | of_logs.keys()
    }


def weigh_artifacts(tx: Session, project_id: str, kept: Collection[str]) -> tuple[dict[int, int], int]:
    """The bytes that go with each build by its number, and those that stay with the builds kept.

    The same bytes in several builds count once, for the newest: they go when it goes.
    """
    number = case((BUILDS.c.id.in_(listed(tx, kept)), literal(_OF_KEPT)), else_=BUILDS.c.number)
    owned = (
        select(func.max(number).label("owner"), ARTIFACTS.c.size)
        .select_from(ARTIFACTS)
        .join(STEPS, STEPS.c.id == ARTIFACTS.c.step_id)
        .join(BUILDS, _IS_ARTIFACT)
        .where(BUILDS.c.project_id == project_id, ARTIFACTS.c.type == "file", _KEEPS_ARTIFACTS)
        .group_by(ARTIFACTS.c.sha256, ARTIFACTS.c.size)
        .subquery()
    )
    statement = select(owned.c.owner, func.sum(owned.c.size)).group_by(owned.c.owner)
    weights = {int(row[0]): int(row[1]) for row in tx.connection().execute(statement)}
    return weights, weights.pop(_OF_KEPT, 0)


# Marks


def lock_expiring(tx: Session, part: Part, expiries: Sequence[Expiry]) -> list[Expiry]:
    """Those of them that still stand as they were judged, each build held until the transaction ends."""
    statement = (
        select(BUILDS.c.id, BUILDS.c.state, BUILDS.c.finished_at)
        .where(BUILDS.c.id.in_([one.build_id for one in expiries]), BUILDS.c.expired_at.is_(None), _HAS[part])
        .order_by(BUILDS.c.id)
        .with_for_update()
    )
    rows = {row.id: row for row in tx.connection().execute(statement)}
    return [
        one
        for one in expiries
        if one.build_id in rows
        and rows[one.build_id].state in FINAL_BUILD_STATES
        and rows[one.build_id].finished_at == one.finished_at
    ]


def mark(tx: Session, build_ids: Collection[str], part: Part, *, now: datetime) -> None:
    """From now on this part of the builds is gone for everybody."""
    values: dict[str, Any] = {}
    if part is not Part.LOGS:
        values |= {"artifacts_expired_at": now, "artifacts_expired_round": BUILDS.c.round}
    if part is not Part.ARTIFACTS:
        values |= {"logs_expired_at": now, "logs_expired_round": BUILDS.c.round}
    if part is Part.BUILD:
        values["expired_at"] = now
    tx.connection().execute(update(BUILDS).where(BUILDS.c.id.in_(sorted(build_ids))).values(values))


def list_marked(tx: Session, project_id: str, *, limit: int) -> list[Marked]:
    """Builds of which something is marked and still there, oldest first."""
    statement = (
        select(
            BUILDS.c.id,
            BUILDS.c.expired_at,
            _HAS_OLD_ARTIFACTS.label("has_artifacts"),
            _HAS_OLD_LOGS.label("has_logs"),
        )
        .where(
            BUILDS.c.project_id == project_id,
            or_(
                BUILDS.c.expired_at.is_not(None),
                and_(BUILDS.c.artifacts_expired_round > 0, _HAS_OLD_ARTIFACTS),
                and_(BUILDS.c.logs_expired_round > 0, _HAS_OLD_LOGS),
            ),
        )
        .order_by(BUILDS.c.number)
        .limit(limit)
    )
    return [
        Marked(row.id, row.expired_at is not None, bool(row.has_artifacts), bool(row.has_logs))
        for row in tx.connection().execute(statement)
    ]


def list_expired_logs(tx: Session, build_id: str) -> list[tuple[str, int]]:
    """The attempts of a build whose logs are marked: step and number."""
    statement = (
        select(ATTEMPTS.c.step_id, ATTEMPTS.c.attempt)
        .join(STEPS, STEPS.c.id == ATTEMPTS.c.step_id)
        .join(BUILDS, BUILDS.c.id == STEPS.c.build_id)
        .where(BUILDS.c.id == build_id, ~_KEEPS_LOGS)
    )
    return [(row.step_id, row.attempt) for row in tx.connection().execute(statement)]


# Rows


def delete_artifacts(tx: Session, build_id: str, *, limit: int, now: datetime) -> int:
    """Some of the artifacts that are marked; what nobody else in the project names is unused from now on."""
    _hold(tx, build_id)
    statement = (
        select(ARTIFACTS.c.id, ARTIFACTS.c.sha256, BUILDS.c.project_id)
        .join(STEPS, STEPS.c.id == ARTIFACTS.c.step_id)
        .join(BUILDS, _IS_ARTIFACT)
        .where(BUILDS.c.id == build_id, ~_KEEPS_ARTIFACTS)
        .limit(limit)
    )
    rows = tx.connection().execute(statement).all()
    if not rows:
        return 0
    project_id = rows[0].project_id
    insert_tombstones(tx, "artifact", project_id, [row.id for row in rows], now=now)
    tx.connection().execute(delete(ARTIFACTS).where(ARTIFACTS.c.id.in_([row.id for row in rows])))
    mark_unused(tx, project_id, {row.sha256 for row in rows if row.sha256}, now=now)
    return len(rows)


def delete_appends(tx: Session, build_id: str, *, limit: int) -> int:
    """Some of the rows of logs that are marked."""
    _hold(tx, build_id)
    last = (
        select(APPENDS.c.seq)
        .join(STEPS, STEPS.c.id == APPENDS.c.step_id)
        .join(BUILDS, _IS_APPEND)
        .where(BUILDS.c.id == build_id, ~_KEEPS_LOGS)
        .order_by(APPENDS.c.seq)
        .limit(limit)
    )
    seqs = tx.connection().execute(last).scalars().all()
    if seqs:
        gone = delete(APPENDS).where(APPENDS.c.build_id == build_id, APPENDS.c.seq.in_(seqs))
        tx.connection().execute(gone)
    return len(seqs)


def _hold(tx: Session, build_id: str) -> Any:
    """The build until the transaction ends: who deletes at the same time sees afterwards what is gone."""
    statement = select(BUILDS).where(BUILDS.c.id == build_id).with_for_update()
    return tx.connection().execute(statement).one_or_none()


def delete_build(tx: Session, build_id: str, *, now: datetime) -> bool:
    """The last rows of a marked build, in whichever table they stand; False when it is gone already."""
    build = _hold(tx, build_id)
    if build is None or build.expired_at is None:
        return False
    project_id = build.project_id
    of_build = select(STEPS.c.id).where(STEPS.c.build_id == build_id)
    steps = tx.connection().execute(of_build).scalars().all()
    insert_tombstones(tx, "step", project_id, steps, now=now)
    insert_tombstones(tx, "build", project_id, [build_id], now=now)
    receipts = select(CANCELS.c.id).where(CANCELS.c.build_id == build_id)
    insert_tombstones(tx, "cancel", project_id, tx.connection().execute(receipts).scalars().all(), now=now)
    for table in reversed(Row.metadata.sorted_tables):
        condition = _belongs(table, build_id)
        if condition is not None:
            tx.connection().execute(delete(table).where(condition))
    return True


def _belongs(table: Table, build_id: str) -> ColumnElement[bool] | None:
    """What makes a row part of a build: it names the build, or one of its steps."""
    if table is BUILDS:
        return BUILDS.c.id == build_id
    if "build_id" in table.c:
        return table.c.build_id == build_id
    if "step_id" in table.c:
        return table.c.step_id.in_(select(STEPS.c.id).where(STEPS.c.build_id == build_id))
    return None


# Tombstones


def insert_tombstones(tx: Session, kind: str, project_id: str, ids: Sequence[str], *, now: datetime) -> None:
    rows = [{"id": one, "kind": kind, "project_id": project_id, "expired_at": now} for one in ids]
    if rows:
        tx.connection().execute(insert(TOMBSTONES), rows)


def find_tombstone(tx: Session, thing_id: str) -> Any:
    """The tombstone of this id, or None."""
    return tx.connection().execute(select(TOMBSTONES).where(TOMBSTONES.c.id == thing_id)).one_or_none()


def delete_tombstones(tx: Session, *, before: datetime, limit: int) -> int:
    """Some of those that are older."""
    statement = select(TOMBSTONES.c.id).where(TOMBSTONES.c.expired_at < before).limit(limit)
    ids = tx.connection().execute(statement).scalars().all()
    if ids:
        tx.connection().execute(delete(TOMBSTONES).where(TOMBSTONES.c.id.in_(ids)))
    return len(ids)


# Blobs


def _is_used(project_id: Any, sha256: Any) -> ColumnElement[bool]:
    return exists().where(
        ARTIFACTS.c.sha256 == sha256, BUILDS.c.id == ARTIFACTS.c.build_id, BUILDS.c.project_id == project_id
    )


def mark_unused(tx: Session, project_id: str, digests: Collection[str], *, now: datetime) -> None:
    """Note since when no artifact of the project names these bytes; those that one names are left alone."""
    if not digests:
        return
    statement = update(BLOBS).where(
        BLOBS.c.project_id == project_id,
        BLOBS.c.sha256.in_(sorted(digests)),
        BLOBS.c.unused_since.is_(None),
        ~_is_used(BLOBS.c.project_id, BLOBS.c.sha256),
    )
    tx.connection().execute(statement.values(unused_since=now))


def list_unused(
    tx: Session, *, after: tuple[str, str], before: datetime, limit: int
) -> tuple[list[tuple[str, str]], tuple[str, str] | None]:
    """Of the next blobs those that no artifact names and that are not marked, and where to go on."""
    project_id, sha256 = after
    is_next = or_(
        BLOBS.c.project_id > project_id, and_(BLOBS.c.project_id == project_id, BLOBS.c.sha256 > sha256)
    )
    is_unused = case(
        (
            and_(
                BLOBS.c.created_at < before,
                BLOBS.c.unused_since.is_(None),
                ~_is_used(BLOBS.c.project_id, BLOBS.c.sha256),
            ),
            1,
        ),
        else_=0,
    )
    page = (
        select(BLOBS.c.project_id, BLOBS.c.sha256, cast(is_unused, Integer).label("is_unused"))
        .where(is_next)
        .order_by(BLOBS.c.project_id, BLOBS.c.sha256)
        .limit(limit)
    )
    rows = tx.connection().execute(page).all()
    found = [(row.project_id, row.sha256) for row in rows if row.is_unused]
    return found, (rows[-1].project_id, rows[-1].sha256) if len(rows) == limit else None


def delete_unused_blobs(
    tx: Session, *, before: datetime, limit: int
) -> tuple[list[tuple[str, str, int]], int]:
    """Rows of bytes that have been unused since then: project, digest, size; and how many were looked at.

    Their rows are held first and asked about after that: a completion that names such bytes has held them
    before and is seen, or comes later and finds them gone.
    """
    statement = (
        select(BLOBS.c.project_id, BLOBS.c.sha256, BLOBS.c.size)
        .where(BLOBS.c.unused_since <= before)
        .order_by(BLOBS.c.project_id, BLOBS.c.sha256)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    held = tx.connection().execute(statement).all()
    gone: list[tuple[str, str, int]] = []
    for row in held:
        is_it = and_(BLOBS.c.project_id == row.project_id, BLOBS.c.sha256 == row.sha256)
        if tx.connection().execute(select(_is_used(row.project_id, row.sha256))).scalar_one():
            tx.connection().execute(update(BLOBS).where(is_it).values(unused_since=None))
        else:
            tx.connection().execute(delete(BLOBS).where(is_it))
            gone.append((row.project_id, row.sha256, row.size))
    return gone, len(held)


def list_known_blobs(tx: Session, digests: Collection[str]) -> set[str]:
    """Those of the digests that any project has."""
    statement = select(BLOBS.c.sha256).where(BLOBS.c.sha256.in_(sorted(digests))).distinct()
    return set(tx.connection().execute(statement).scalars())


def list_known_builds(tx: Session, build_ids: Collection[str]) -> set[str]:
    """Those of the ids that are builds."""
    statement = select(BUILDS.c.id).where(BUILDS.c.id.in_(sorted(build_ids)))
    return set(tx.connection().execute(statement).scalars())
