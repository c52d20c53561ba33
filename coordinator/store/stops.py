"""Telling steps to stop: those that wait end at once, those that a runner holds are asked, and watched."""

from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import and_, exists, func, or_, select, update
from sqlmodel import Session

from coordinator.rules.limits import grace_seconds
from coordinator.rules.transitions import STEP_TRANSITIONS, StepEvent
from coordinator.tables import Build, Step, table_of
from shared.reasons import Reason
from shared.states import LEASED_STEP_STATES, BuildState, StepState

BUILDS = table_of(Build)
STEPS = table_of(Step)
WAITING = (StepState.PENDING, StepState.READY)
STOP_LIMIT = timedelta(seconds=60)  # beyond the grace, until a runner that speaks must have stopped its step


def end_waiting(tx: Session, build_id: str, event: StepEvent, *, reason: str, now: datetime) -> list[Any]:
    """Cancel or skip the steps of this build that nobody holds at the moment of the statement itself."""
    sources, target = STEP_TRANSITIONS[event]
    statement = (
        update(STEPS)
        .where(STEPS.c.build_id == build_id, STEPS.c.state.in_(sources - LEASED_STEP_STATES))
        .values(state=target, finished_at=now, reason=reason)
        .returning(STEPS.c.id, STEPS.c.build_id, STEPS.c.attempt, STEPS.c.state)
    )
    return list(tx.connection().execute(statement).all())


def list_stopped_builds(tx: Session, *, limit: int) -> list[Any]:
    """Builds that were told to stop, or whose time is over, and of which something still waits to begin."""
    is_told = or_(
        BUILDS.c.state == BuildState.CANCELLING,
        and_(BUILDS.c.state == BuildState.RUNNING, BUILDS.c.reason == Reason.BUILD_TIMEOUT),
    )
    waits = exists().where(STEPS.c.build_id == BUILDS.c.id, STEPS.c.state.in_(WAITING))
    statement = select(BUILDS.c.id).where(is_told, waits).order_by(BUILDS.c.id).limit(limit)
    return list(tx.connection().execute(statement).all())


def request_stop_of_build(tx: Session, build_id: str, *, reason: str, now: datetime) -> None:
    """Ask the runners of this build's leased steps to stop; who was asked before, for whatever, was asked."""
    _request(tx, STEPS.c.build_id == build_id, reason=reason, now=now)


def request_stop(tx: Session, step_id: str, attempt: int, *, reason: str, now: datetime) -> bool:
    """Ask the runner of this attempt to stop; False when it has ended or was asked before."""
    return bool(_request(tx, and_(STEPS.c.id == step_id, STEPS.c.attempt == attempt), reason=reason, now=now))


def _request(tx: Session, which: Any, *, reason: str, now: datetime) -> list[Any]:
    statement = (
        update(STEPS)
        .where(which, STEPS.c.state.in_(LEASED_STEP_STATES), STEPS.c.cancel_requested_at.is_(None))
        .values(cancel_requested_at=now, cancel_reason=reason)
        .returning(STEPS.c.id, STEPS.c.spec)
    )
    asked = tx.connection().execute(statement).all()
    by_grace: dict[int, list[str]] = defaultdict(list)
    for step in asked:
        by_grace[grace_seconds(step.spec)].append(step.id)
    for grace, step_ids in by_grace.items():
        _set_force_at(tx, step_ids, now + timedelta(seconds=grace) + STOP_LIMIT)
    return list(asked)


def _set_force_at(tx: Session, step_ids: Iterable[str], moment: datetime) -> None:
    tx.connection().execute(
        update(STEPS).where(STEPS.c.id.in_(list(step_ids))).values(cancel_force_at=moment)
    )


def latest_wish(tx: Session, runner_id: str) -> datetime | None:
    """When this runner was last asked to stop one of the steps that it holds."""
    statement = select(func.max(STEPS.c.cancel_requested_at)).where(
        STEPS.c.runner_id == runner_id, STEPS.c.state.in_(LEASED_STEP_STATES)
    )
    found: datetime | None = tx.connection().execute(statement).scalar_one()
    return found


def list_leased(tx: Session, build_id: str) -> list[Any]:
    """The steps of this build that somebody holds."""
    statement = select(STEPS.c.id, STEPS.c.attempt).where(
        STEPS.c.build_id == build_id, STEPS.c.state.in_(LEASED_STEP_STATES)
    )
    return list(tx.connection().execute(statement).all())


def list_unstopped(tx: Session, *, now: datetime, silent_since: datetime | None, limit: int) -> list[Any]:
    """Leased steps that were told to stop and are waited for no longer, the oldest wish first.

    Those whose time is over, and, where `silent_since` is given, those whose runner was last heard before.
    """
    too_long = or_(
        STEPS.c.runner_id.is_(None),
        STEPS.c.cancel_force_at <= now,
        # asked by a version that did not say how long it would wait
        and_(STEPS.c.cancel_force_at.is_(None), STEPS.c.cancel_requested_at <= now - 2 * STOP_LIMIT),
    )
    if silent_since is not None:
        too_long = or_(too_long, STEPS.c.last_seen_at < silent_since)
    statement = (
        select(STEPS)
        .where(
            STEPS.c.state.in_(LEASED_STEP_STATES),
            STEPS.c.cancel_requested_at.is_not(None),
            too_long,
        )
        .order_by(STEPS.c.cancel_requested_at, STEPS.c.id)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())
