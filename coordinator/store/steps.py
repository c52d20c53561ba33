"""Steps: the queue, the leases and the moves. The statements here are the ones that must be fast."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import exists, func, insert, or_, select, update
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.errors import NotFound
from coordinator.rules.transitions import STEP_TRANSITIONS, StepEvent
from coordinator.tables import Step, StepDependency, StepLabel, table_of
from shared.states import LEASED_STEP_STATES, StepState

STEPS = table_of(Step)
LABELS = table_of(StepLabel)
DEPENDENCIES = table_of(StepDependency)


def insert_steps(
    tx: Session,
    steps: Sequence[dict[str, Any]],
    labels: Sequence[dict[str, Any]],
    dependencies: Sequence[dict[str, Any]],
) -> None:
    connection = tx.connection()
    connection.execute(insert(STEPS), list(steps))
    if labels:
        connection.execute(insert(LABELS), list(labels))
    if dependencies:
        connection.execute(insert(DEPENDENCIES), list(dependencies))


def find_step(tx: Session, step_id: str) -> Row[Any] | None:
    return tx.connection().execute(select(STEPS).where(STEPS.c.id == step_id)).one_or_none()


def get_step(tx: Session, step_id: str) -> Row[Any]:
    row = find_step(tx, step_id)
    if row is None:
        raise NotFound("no such step")
    return row


def list_steps(tx: Session, build_id: str) -> list[Row[Any]]:
    """All steps of a build in the workflow's order."""
    statement = select(STEPS).where(STEPS.c.build_id == build_id).order_by(STEPS.c.position)
    return list(tx.connection().execute(statement).all())


def claim_steps(
    tx: Session, *, runner_id: str, request_id: str, labels: Sequence[str], limit: int, now: datetime
) -> list[Row[Any]]:
    """Give up to `limit` ready steps to this runner, each with a new attempt, oldest first.

    One guarded statement; the materialised part keeps Postgres from looking, and claiming, twice.
    """
    lacks_label = exists().where(LABELS.c.step_id == STEPS.c.id, LABELS.c.label.not_in(labels))
    ready = (
        select(STEPS.c.id)
        .where(
            STEPS.c.state == StepState.READY,
            or_(STEPS.c.not_before.is_(None), STEPS.c.not_before <= now),
            or_(STEPS.c.label_count == 0, ~lacks_label),
        )
        .order_by(STEPS.c.ready_at, STEPS.c.id)
        .limit(limit)
        .with_for_update(skip_locked=True, of=STEPS)
        .cte("ready")
        .prefix_with("MATERIALIZED")
    )
    sources, target = STEP_TRANSITIONS[StepEvent.CLAIM]
    statement = (
        update(STEPS)
        .where(STEPS.c.id.in_(select(ready.c.id)), STEPS.c.state.in_(sources))
        .values(
            state=target,
            attempt=STEPS.c.attempt + 1,
            runner_id=runner_id,
            request_id=request_id,
            claimed_at=now,
            last_seen_at=now,
            acked_at=None,
            started_at=None,
            phase=None,
            exit_code=None,
            reason=None,
            image_digest=None,
            log_size=0,
        )
        .returning(*STEPS.c)
    )
    claimed = tx.connection().execute(statement).all()
    return sorted(claimed, key=lambda step: (step.ready_at, step.id))


def claim_step(tx: Session, step_id: str, *, now: datetime) -> bool:
    """Claim this one step for a caller that is no registered runner."""
    return move_step(
        tx,
        step_id,
        StepEvent.CLAIM,
        attempt_after=True,
        runner_id=None,
        request_id=None,
        claimed_at=now,
        last_seen_at=now,
        started_at=now,
        log_size=0,
    )


def list_claims(tx: Session, *, runner_id: str, request_id: str) -> list[Row[Any]]:
    """What this request has already got and not yet used."""
    statement = select(STEPS).where(
        STEPS.c.runner_id == runner_id,
        STEPS.c.request_id == request_id,
        STEPS.c.state == StepState.CLAIMED,
        STEPS.c.acked_at.is_(None),
    )
    return list(tx.connection().execute(statement.order_by(STEPS.c.ready_at, STEPS.c.id)).all())


def move_step(
    tx: Session,
    step_id: str,
    event: StepEvent,
    *,
    attempt: int | None = None,
    attempt_after: bool = False,
    unheard_since: datetime | None = None,
    **values: Any,
) -> bool:
    """Apply `event` if the step stands where it may, and under this attempt; False when it does not.

    With `unheard_since` only if nothing was heard of the attempt after that moment: who looks for silence
    must not act on what was true when it looked.
    """
    sources, target = STEP_TRANSITIONS[event]
    conditions = [STEPS.c.id == step_id, STEPS.c.state.in_(sources)]
    if attempt is not None:
        conditions.append(STEPS.c.attempt == attempt)
    if unheard_since is not None:
        conditions.append(STEPS.c.last_seen_at <= unheard_since)
    if attempt_after:
        values["attempt"] = STEPS.c.attempt + 1
    statement = update(STEPS).where(*conditions).values(state=target, **values)
    return tx.connection().execute(statement).rowcount == 1


def change_attempt(tx: Session, step_id: str, attempt: int, **values: Any) -> bool:
    """Change facts of a leased step without moving it; False when the attempt is no longer current."""
    statement = (
        update(STEPS)
        .where(STEPS.c.id == step_id, STEPS.c.attempt == attempt, STEPS.c.state.in_(LEASED_STEP_STATES))
        .values(**values)
    )
    return tx.connection().execute(statement).rowcount == 1


def touch_steps(tx: Session, step_ids: Sequence[str], runner_id: str, *, now: datetime) -> None:
    """These attempts were heard of: acknowledged if they were not, and alive."""
    statement = (
        update(STEPS)
        .where(
            STEPS.c.id.in_(step_ids),
            STEPS.c.runner_id == runner_id,
            STEPS.c.state.in_(LEASED_STEP_STATES),
        )
        .values(last_seen_at=now, acked_at=func.coalesce(STEPS.c.acked_at, now))
    )
    tx.connection().execute(statement)


def list_steps_by_id(tx: Session, step_ids: Sequence[str]) -> dict[str, Row[Any]]:
    if not step_ids:
        return {}
    rows = tx.connection().execute(select(STEPS).where(STEPS.c.id.in_(step_ids))).all()
    return {row.id: row for row in rows}


def list_dependents(tx: Session, step_ids: Sequence[str]) -> dict[str, list[StepState]]:
    """The waiting steps right behind these, each with the states of all its dependencies."""
    behind = select(DEPENDENCIES.c.step_id).where(DEPENDENCIES.c.depends_on_id.in_(step_ids))
    waiting = STEPS.alias("waiting")
    statement = (
        select(DEPENDENCIES.c.step_id, STEPS.c.state)
        .join(STEPS, STEPS.c.id == DEPENDENCIES.c.depends_on_id)
        .join(waiting, waiting.c.id == DEPENDENCIES.c.step_id)
        .where(DEPENDENCIES.c.step_id.in_(behind), waiting.c.state == StepState.PENDING)
    )
    states: dict[str, list[StepState]] = {}
    for step_id, state in tx.connection().execute(statement):
        states.setdefault(step_id, []).append(StepState(state))
    return states


def move_steps(tx: Session, step_ids: Iterable[str], event: StepEvent, **values: Any) -> list[str]:
    """Apply `event` to those of the steps that stand where it may; returns their ids."""
    wanted = list(step_ids)
    if not wanted:
        return []
    sources, target = STEP_TRANSITIONS[event]
    statement = (
        update(STEPS)
        .where(STEPS.c.id.in_(wanted), STEPS.c.state.in_(sources))
        .values(state=target, **values)
        .returning(STEPS.c.id)
    )
    return [row.id for row in tx.connection().execute(statement)]


def cancel_waiting(tx: Session, build_id: str, *, reason: str, now: datetime) -> None:
    """Cancel the steps of this build that nobody holds at the moment of the statement itself."""
    sources, target = STEP_TRANSITIONS[StepEvent.CANCEL]
    statement = (
        update(STEPS)
        .where(STEPS.c.build_id == build_id, STEPS.c.state.in_(sources - LEASED_STEP_STATES))
        .values(state=target, finished_at=now, reason=reason)
    )
    tx.connection().execute(statement)


def count_states(tx: Session, build_id: str) -> dict[StepState, int]:
    statement = (
        select(STEPS.c.state, func.count()).where(STEPS.c.build_id == build_id).group_by(STEPS.c.state)
    )
    return {StepState(state): count for state, count in tx.connection().execute(statement)}


def find_first_reason(tx: Session, build_id: str) -> str | None:
    """Why the build's first failed step failed; others may have ended well after it."""
    statement = (
        select(STEPS.c.reason)
        .where(STEPS.c.build_id == build_id, STEPS.c.state == StepState.FAILED)
        .order_by(STEPS.c.finished_at, STEPS.c.position)
        .limit(1)
    )
    return tx.connection().execute(statement).scalar_one_or_none()


def list_dependencies(tx: Session, build_id: str) -> dict[str, list[str]]:
    """Every arrow of the build: step id to the ids it depends on directly."""
    statement = select(DEPENDENCIES.c.step_id, DEPENDENCIES.c.depends_on_id).where(
        DEPENDENCIES.c.build_id == build_id
    )
    arrows: dict[str, list[str]] = {}
    for step_id, depends_on_id in tx.connection().execute(statement):
        arrows.setdefault(step_id, []).append(depends_on_id)
    return arrows


def list_unacknowledged(tx: Session, *, before: datetime, limit: int) -> list[Row[Any]]:
    """Claims that no heartbeat has named since `before`."""
    statement = (
        select(STEPS)
        .where(
            STEPS.c.state == StepState.CLAIMED,
            STEPS.c.acked_at.is_(None),
            STEPS.c.claimed_at < before,
            STEPS.c.runner_id.is_not(None),
        )
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def list_unacknowledged_of(tx: Session, runner_id: str) -> list[Row[Any]]:
    """The claims of this runner that no heartbeat has named."""
    statement = select(STEPS).where(
        STEPS.c.runner_id == runner_id, STEPS.c.state == StepState.CLAIMED, STEPS.c.acked_at.is_(None)
    )
    return list(tx.connection().execute(statement).all())


def list_silent(tx: Session, *, before: datetime, limit: int) -> list[Row[Any]]:
    """Acknowledged attempts whose runner was last heard before `before`."""
    statement = (
        select(STEPS)
        .where(
            STEPS.c.state.in_(LEASED_STEP_STATES),
            STEPS.c.acked_at.is_not(None),
            STEPS.c.last_seen_at < before,
            STEPS.c.runner_id.is_not(None),
        )
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def list_uncancelled(tx: Session, *, before: datetime, limit: int) -> list[Row[Any]]:
    """Leased steps whose cancellation was asked for before `before`."""
    statement = (
        select(STEPS)
        .where(STEPS.c.state.in_(LEASED_STEP_STATES), STEPS.c.cancel_requested_at < before)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def request_cancel(tx: Session, build_id: str, *, reason: str, now: datetime) -> None:
    """Ask the runners of this build's leased steps to stop."""
    statement = (
        update(STEPS)
        .where(
            STEPS.c.build_id == build_id,
            STEPS.c.state.in_(LEASED_STEP_STATES),
            STEPS.c.cancel_requested_at.is_(None),
        )
        .values(cancel_requested_at=now, cancel_reason=reason)
    )
    tx.connection().execute(statement)
