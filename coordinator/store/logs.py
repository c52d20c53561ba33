"""What is known of logs: the order in which their pieces came."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import and_, bindparam, case, func, insert, literal, select
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.store.prepared import Prepared
from coordinator.store.statements import given, given_any
from coordinator.tables import LogAppend, Step, StepAttempt, table_of

APPENDS = table_of(LogAppend)
STEPS = table_of(Step)
ATTEMPTS = table_of(StepAttempt)

_LAST = select(func.max(APPENDS.c.seq)).where(APPENDS.c.build_id == given(APPENDS.c.build_id))
_INSERT = insert(APPENDS)


def insert_append(
    tx: Session, step: Any, *, offset: int, length: int, now: datetime, attempt: int | None = None
) -> None:
    """The next piece of a build's log, from the current attempt or this one; the caller holds the build."""
    last = tx.connection().execute(_LAST, {"the_build_id": step.build_id})
    tx.connection().execute(
        _INSERT,
        {
            "build_id": step.build_id,
            "seq": (last.scalar_one() or 0) + 1,
            "step_id": step.id,
            "attempt": attempt or step.attempt,
            "byte_offset": offset,
            "byte_length": length,
            "at": now,
        },
    )


# The log of a build, read piece by piece

OF_BUILD = 0  # in place of an attempt: everything that stands open ends here, as the build has ended

_LENGTH = APPENDS.c.byte_length
_ENDS = (
    select(
        APPENDS.c.step_id,
        APPENDS.c.attempt,
        func.max(APPENDS.c.byte_offset + _LENGTH).label("end"),
        func.max(case((_LENGTH == 0, APPENDS.c.byte_offset), else_=0)).label("flushed"),
        func.max(APPENDS.c.seq).label("last"),
    )
    .where(
        APPENDS.c.build_id == given(APPENDS.c.build_id),
        APPENDS.c.seq > bindparam("after"),
        APPENDS.c.seq < bindparam("before"),
        APPENDS.c.attempt != OF_BUILD,
    )
    .group_by(APPENDS.c.step_id, APPENDS.c.attempt)
)
_LAST_END = select(func.max(APPENDS.c.seq)).where(
    APPENDS.c.build_id == given(APPENDS.c.build_id),
    APPENDS.c.seq < bindparam("before"),
    APPENDS.c.attempt == OF_BUILD,
)
_WITH_STEPS = select(
    APPENDS,
    STEPS.c.name,
    STEPS.c.state,
    STEPS.c.attempt.label("current_attempt"),
    ATTEMPTS.c.runner_id,
    ATTEMPTS.c.image_digest,
    ATTEMPTS.c.started_at,
).select_from(
    APPENDS.outerjoin(STEPS, STEPS.c.id == APPENDS.c.step_id).outerjoin(
        ATTEMPTS, and_(ATTEMPTS.c.step_id == APPENDS.c.step_id, ATTEMPTS.c.attempt == APPENDS.c.attempt)
    )
)
_OF_BUILD = APPENDS.c.build_id == given(APPENDS.c.build_id)
_BEHIND = (
    _WITH_STEPS.where(_OF_BUILD, APPENDS.c.seq > bindparam("after"))
    .order_by(APPENDS.c.seq)
    .limit(bindparam("most"))
)
_THESE = _WITH_STEPS.where(_OF_BUILD, given_any(APPENDS.c.seq))
_CLOSE = Prepared(
    insert(APPENDS).from_select(
        ["build_id", "seq", "step_id", "attempt", "byte_offset", "byte_length", "at"],
        select(
            APPENDS.c.build_id,
            APPENDS.c.seq + 1,
            APPENDS.c.step_id,
            literal(OF_BUILD),
            literal(0),
            literal(0),
            bindparam("now", type_=APPENDS.c.at.type),
        )
        .where(APPENDS.c.build_id == given(APPENDS.c.build_id))
        .order_by(APPENDS.c.seq.desc())
        .limit(1),
    )
)


def find_last(tx: Session, build_id: str) -> int:
    """The number of the last piece of a build's log, 0 where it has none."""
    return int(tx.connection().execute(_LAST, {"the_build_id": build_id}).scalar_one() or 0)


def list_pieces(tx: Session, build_id: str, *, after: int, limit: int) -> list[Row[Any]]:
    """The pieces behind this one, with the step and the attempt that each is of."""
    wanted = {"the_build_id": build_id, "after": after, "most": limit}
    return list(tx.connection().execute(_BEHIND, wanted).all())


def list_these(tx: Session, build_id: str, numbers: Sequence[int]) -> dict[int, Row[Any]]:
    """These pieces by their numbers, as `list_pieces` has them."""
    wanted = {"the_build_id": build_id, "any_seq": list(numbers)}
    return {row.seq: row for row in tx.connection().execute(_THESE, wanted)}


def list_ends(tx: Session, build_id: str, *, before: int) -> Sequence[Any]:
    """How far each attempt's log had come before this piece, and up to where its last line was ended.

    What was written before all of it was ended is left out.
    """
    wanted = {"the_build_id": build_id, "before": before}
    last = tx.connection().execute(_LAST_END, wanted).scalar_one() or 0
    return tx.connection().execute(_ENDS, {**wanted, "after": last}).all()


def end_log(tx: Session, build_id: str, *, now: datetime) -> None:
    """Let every line end here that no newline has ended, so that what comes later cannot change its place.

    The caller holds the build's row. A build that has said nothing gets no such piece.
    """
    _CLOSE.run(tx, {"the_build_id": build_id, "now": now})
