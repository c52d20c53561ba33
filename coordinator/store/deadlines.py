"""What has taken too long: steps in the queue, on a runner or while they ran, and whole builds."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Column, ColumnElement, and_, func, or_, select, update
from sqlmodel import Session

from coordinator.rules.transitions import STEP_TRANSITIONS, StepEvent
from coordinator.tables import Build, Step, table_of
from shared.protocol import Phase
from shared.reasons import Reason
from shared.states import LEASED_STEP_STATES, BuildState, StepState

BUILDS = table_of(Build)
STEPS = table_of(Step)
FROM_THE_FIRST = (datetime.min.replace(tzinfo=UTC), "")
AFTER_THE_SCRIPT = (Phase.COLLECTING, Phase.UPLOADING, Phase.COMPLETING)


def list_queue_limits(tx: Session) -> list[tuple[int, datetime]]:
    """The limits, in seconds, of steps that wait for a runner now, and since when the first of them waits."""
    statement = (
        select(STEPS.c.queue_limit_s, func.min(STEPS.c.ready_at))
        .where(
            STEPS.c.queue_limit_s.is_not(None),
            STEPS.c.state == StepState.READY,
            STEPS.c.ready_at.is_not(None),
        )
        .group_by(STEPS.c.queue_limit_s)
    )
    return [(row[0], row[1]) for row in tx.connection().execute(statement)]


def list_queued(tx: Session, *, limit_s: int, before: datetime, limit: int) -> list[Any]:
    """Steps with this limit that have been ready, and free to be taken, since before that moment."""
    statement = (
        select(STEPS)
        .where(
            STEPS.c.queue_limit_s == limit_s,
            STEPS.c.state == StepState.READY,
            STEPS.c.ready_at <= before,
            or_(STEPS.c.not_before.is_(None), STEPS.c.not_before <= before),
        )
        .order_by(STEPS.c.ready_at, STEPS.c.id)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def fail_queued(tx: Session, step: Any, *, reason: str, now: datetime) -> bool:
    """End a step in the queue; False when someone has taken it, or taken it up again, meanwhile."""
    _, target = STEP_TRANSITIONS[StepEvent.FAIL]
    statement = (
        update(STEPS)
        .where(STEPS.c.id == step.id, STEPS.c.attempt == step.attempt, STEPS.c.state == StepState.READY)
        .values(state=target, reason=reason, finished_at=now)
    )
    return tx.connection().execute(statement).rowcount == 1


def list_overrun(
    tx: Session,
    *,
    now: datetime,
    delivery_limit: timedelta,
    after: tuple[datetime, str] = FROM_THE_FIRST,
    limit: int,
) -> list[Any]:
    """Running steps whose runner should have ended them; those that only hand on have longer.

    A page of them, those whose limit was over first at its head; `after`: that limit and the id of the last
    one of the page before.
    """
    statement = (
        select(STEPS)
        .where(
            STEPS.c.state == StepState.RUNNING,
            STEPS.c.deadline_at <= now,
            STEPS.c.cancel_requested_at.is_(None),
            or_(
                STEPS.c.phase.is_(None),
                STEPS.c.phase.not_in(AFTER_THE_SCRIPT),
                STEPS.c.deadline_at <= now - delivery_limit,
            ),
            _comes_after(STEPS.c.deadline_at, after),
        )
        .order_by(STEPS.c.deadline_at, STEPS.c.id)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def list_unstarted(
    tx: Session, *, before: datetime, after: tuple[datetime, str] = FROM_THE_FIRST, limit: int
) -> list[Any]:
    """Claims that a runner has prepared since before that moment and not started, oldest first.

    A page of them; `after`: when the last one of the page before was claimed, and its id.
    """
    statement = (
        select(STEPS)
        .where(
            STEPS.c.state == StepState.CLAIMED,
            STEPS.c.acked_at.is_not(None),
            STEPS.c.claimed_at <= before,
            STEPS.c.cancel_requested_at.is_(None),
            _comes_after(STEPS.c.claimed_at, after),
        )
        .order_by(STEPS.c.claimed_at, STEPS.c.id)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def _comes_after(moment: Column[Any], place: tuple[datetime, str]) -> ColumnElement[bool]:
    at, step_id = place
    return or_(moment > at, and_(moment == at, STEPS.c.id > step_id))


def list_unlimited_builds(tx: Session, *, limit: int) -> list[Any]:
    """Builds that have begun, have a time limit, and do not yet know when it is over."""
    statement = (
        select(BUILDS.c.id, BUILDS.c.started_at, BUILDS.c.timeout_s)
        .where(
            BUILDS.c.state == BuildState.RUNNING,
            BUILDS.c.timeout_s.is_not(None),
            BUILDS.c.started_at.is_not(None),
            BUILDS.c.deadline_at.is_(None),
        )
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def set_build_deadline(tx: Session, build_id: str, started_at: datetime, deadline_at: datetime) -> None:
    """Write down when the limit is over, unless the build has begun anew meanwhile."""
    tx.connection().execute(
        update(BUILDS)
        .where(BUILDS.c.id == build_id, BUILDS.c.started_at == started_at)
        .values(deadline_at=deadline_at)
    )


def list_overdue_builds(tx: Session, *, now: datetime, limit: int) -> list[Any]:
    """Running builds whose time is over and that have not been told."""
    statement = (
        select(BUILDS.c.id, BUILDS.c.project_id, BUILDS.c.started_at)
        .where(
            BUILDS.c.state == BuildState.RUNNING,
            BUILDS.c.deadline_at <= now,
            or_(BUILDS.c.reason.is_(None), BUILDS.c.reason != Reason.BUILD_TIMEOUT),
        )
        .order_by(BUILDS.c.deadline_at, BUILDS.c.id)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def mark_build_overdue(tx: Session, build_id: str, *, now: datetime) -> bool:
    """Give the build its reason; False when it no longer runs, or has it already."""
    statement = (
        update(BUILDS)
        .where(
            BUILDS.c.id == build_id,
            BUILDS.c.state == BuildState.RUNNING,
            or_(BUILDS.c.reason.is_(None), BUILDS.c.reason != Reason.BUILD_TIMEOUT),
        )
        .values(reason=Reason.BUILD_TIMEOUT, updated_at=now)
    )
    return tx.connection().execute(statement).rowcount == 1


def set_phase(tx: Session, step_ids: Sequence[str], runner_id: str, phase: Phase) -> None:
    """How far this runner is with these steps."""
    tx.connection().execute(
        update(STEPS)
        .where(
            STEPS.c.id.in_(step_ids),
            STEPS.c.runner_id == runner_id,
            STEPS.c.state.in_(LEASED_STEP_STATES),
        )
        .values(phase=phase)
    )
