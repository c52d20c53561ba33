"""Artifacts and the blobs a project has."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, insert, select, update
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.errors import NotFound, Unavailable
from coordinator.store.dialect import insert_if_absent
from coordinator.store.statements import given
from coordinator.tables import Artifact, Blob, StepDependency, table_of

ARTIFACTS = table_of(Artifact)
BLOBS = table_of(Blob)
DEPENDENCIES = table_of(StepDependency)

_INSERT_TRIES = 3


def _of_all_behind(columns: Select[Any]) -> Select[Any]:
    """Only the artifacts of the steps that `the_step_id` depends on, directly or not."""
    arrows = DEPENDENCIES.alias("arrows")
    first = (
        select(DEPENDENCIES.c.depends_on_id)
        .where(DEPENDENCIES.c.step_id == given(DEPENDENCIES.c.step_id))
        .cte("behind", recursive=True)
    )
    behind = first.union(
        select(arrows.c.depends_on_id).join(first, arrows.c.step_id == first.c.depends_on_id)
    )
    return columns.where(
        ARTIFACTS.c.build_id == given(ARTIFACTS.c.build_id),
        ARTIFACTS.c.step_id.in_(select(behind.c.depends_on_id)),
    )


_INPUT_SIZE = _of_all_behind(
    select(ARTIFACTS.c.size)
    .where(ARTIFACTS.c.type == "file", ARTIFACTS.c.sha256 == given(ARTIFACTS.c.sha256))
    .limit(1)
)
_COUNT_INPUTS = _of_all_behind(select(func.count()).select_from(ARTIFACTS))


def insert_blob(tx: Session, *, project_id: str, sha256: str, size: int, now: datetime) -> bool:
    """The project has this blob and wants it; False when it had it before."""
    row = {"project_id": project_id, "sha256": sha256, "size": size, "created_at": now}
    is_it = (BLOBS.c.project_id == project_id, BLOBS.c.sha256 == sha256)
    for _ in range(_INSERT_TRIES):
        if insert_if_absent(tx, BLOBS, row):
            return True
        wanted = update(BLOBS).where(*is_it).values(created_at=now, unused_since=None)
        if tx.connection().execute(wanted.returning(BLOBS.c.sha256)).first() is not None:
            return False
        # another transaction was just deleting the row when it stood in the way, and has done so now
    raise Unavailable("this blob is being deleted; send it again")


def find_blob_size(tx: Session, project_id: str, sha256: str) -> int | None:
    """The size of a blob that stays; bytes that may soon go have to be sent again."""
    statement = select(BLOBS.c.size).where(
        BLOBS.c.project_id == project_id, BLOBS.c.sha256 == sha256, BLOBS.c.unused_since.is_(None)
    )
    size = tx.connection().execute(statement).scalar_one_or_none()
    return None if size is None else int(size)


def list_blob_sizes(tx: Session, project_id: str, digests: Collection[str]) -> dict[str, int]:
    """The sizes of those of the digests that the project has stored; none of them goes meanwhile."""
    wanted = sorted(set(digests))
    sizes: dict[str, int] = {}
    for start in range(0, len(wanted), 500):
        statement = (
            select(BLOBS.c.sha256, BLOBS.c.size)
            .where(BLOBS.c.project_id == project_id, BLOBS.c.sha256.in_(wanted[start : start + 500]))
            .with_for_update(read=True, key_share=True)
        )
        sizes |= {row.sha256: row.size for row in tx.connection().execute(statement)}
    return sizes


def insert_artifacts(tx: Session, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        tx.connection().execute(insert(ARTIFACTS), list(rows))


def get_artifact(tx: Session, artifact_id: str) -> Row[Any]:
    statement = select(ARTIFACTS).where(ARTIFACTS.c.id == artifact_id)
    row = tx.connection().execute(statement).one_or_none()
    if row is None:
        raise NotFound("no such artifact")
    return row


def list_artifacts_of_steps(tx: Session, build_id: str, step_ids: Collection[str]) -> list[Row[Any]]:
    found: list[Row[Any]] = []
    wanted = sorted(set(step_ids))
    for start in range(0, len(wanted), 500):
        statement = select(ARTIFACTS).where(
            ARTIFACTS.c.build_id == build_id, ARTIFACTS.c.step_id.in_(wanted[start : start + 500])
        )
        found += tx.connection().execute(statement.order_by(ARTIFACTS.c.path)).all()
    return found


def find_input_size(tx: Session, build_id: str, step_id: str, sha256: str) -> int | None:
    """The size of this blob, if a step that this one depends on, directly or not, has handed it on."""
    which = {"the_build_id": build_id, "the_step_id": step_id, "the_sha256": sha256}
    size = tx.connection().execute(_INPUT_SIZE, which).scalar_one_or_none()
    return None if size is None else int(size)


def count_inputs(tx: Session, build_id: str, step_id: str) -> int:
    """How many artifacts the steps that this one depends on, directly or not, have handed on."""
    which = {"the_build_id": build_id, "the_step_id": step_id}
    return int(tx.connection().execute(_COUNT_INPUTS, which).scalar_one())
