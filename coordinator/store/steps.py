"""Steps: the queue, the leases and the moves. The statements here are the ones that must be fast."""

import functools
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    UpdateBase,
    bindparam,
    exists,
    func,
    insert,
    literal_column,
    or_,
    select,
    update,
)
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.errors import NotFound
from coordinator.rules.transitions import STEP_TRANSITIONS, StepEvent
from coordinator.store.lane_session import needs_locks
from coordinator.store.prepared import Found, Prepared
from coordinator.store.rounds import IS_LATEST
from coordinator.store.statements import alike, among, as_new, given, given_any, new_values
from coordinator.tables import Project, Step, StepDependency, StepLabel, table_of
from shared.states import LEASED_STEP_STATES, StepState

STEPS = table_of(Step)
LABELS = table_of(StepLabel)
DEPENDENCIES = table_of(StepDependency)
PROJECTS = table_of(Project)
_WAITING = STEPS.alias("waiting")

_IS_IT = STEPS.c.id == given(STEPS.c.id)
_TENANT = select(PROJECTS.c.tenant_id).where(PROJECTS.c.id == given(PROJECTS.c.id))
_OF_BUILD = STEPS.c.build_id == given(STEPS.c.build_id)
_FIND = Prepared(select(STEPS).where(_IS_IT))
_LIST = select(STEPS).where(_OF_BUILD, IS_LATEST).order_by(STEPS.c.position)
_BY_ID = Prepared(select(STEPS).where(given_any(STEPS.c.id)))
_LOCK_EACH = Prepared(
    select(STEPS.c.id).where(given_any(STEPS.c.id)).order_by(STEPS.c.id).with_for_update(key_share=True)
)
_COUNT_STATES = Prepared(
    select(STEPS.c.state, func.count().label("count")).where(_OF_BUILD).group_by(STEPS.c.state)
)
_ARROWS = select(DEPENDENCIES.c.step_id, DEPENDENCIES.c.depends_on_id).where(
    DEPENDENCIES.c.build_id == given(DEPENDENCIES.c.build_id)
)


def _stands_in(sources: Collection[str]) -> ColumnElement[bool]:
    """The state of steps that are named otherwise: by an index of it SQLite would walk the whole queue."""
    return among(STEPS.c.state.concat(""), sources)


_CLAIMS = Prepared(
    select(STEPS).where(
        STEPS.c.runner_id == given(STEPS.c.runner_id),
        STEPS.c.request_id == given(STEPS.c.request_id),
        STEPS.c.state == StepState.CLAIMED,
        STEPS.c.acked_at.is_(None),
    )
)
_DEPENDENTS = (
    select(DEPENDENCIES.c.step_id, STEPS.c.state)
    .join(STEPS, STEPS.c.id == DEPENDENCIES.c.depends_on_id)
    .join(_WAITING, _WAITING.c.id == DEPENDENCIES.c.step_id)
    .where(
        DEPENDENCIES.c.step_id.in_(
            select(DEPENDENCIES.c.step_id).where(given_any(DEPENDENCIES.c.depends_on_id))
        ),
        _WAITING.c.state == StepState.PENDING,
    )
)
_TOUCH = (
    update(STEPS)
    .where(
        given_any(STEPS.c.id),
        STEPS.c.runner_id == given(STEPS.c.runner_id),
        among(STEPS.c.state, LEASED_STEP_STATES),
    )
    .values(
        last_seen_at=bindparam("new_last_seen_at", type_=STEPS.c.last_seen_at.type),
        acked_at=func.coalesce(
            STEPS.c.acked_at, bindparam("new_last_seen_at", type_=STEPS.c.last_seen_at.type)
        ),
    )
)


def _build_claim(*in_queue: ColumnElement[bool]) -> Prepared:
    """One guarded statement; the materialised part keeps Postgres from looking, and claiming, twice."""
    now = bindparam("now", type_=STEPS.c.claimed_at.type)
    has_label = given_any(LABELS.c.label, "labels")
    lacks_label = exists().where(LABELS.c.step_id == STEPS.c.id, ~has_label)
    ready = (
        select(STEPS.c.id)
        .where(
            *in_queue,
            or_(STEPS.c.not_before.is_(None), STEPS.c.not_before <= now),
            STEPS.c.label_count >= bindparam("fewest_labels", type_=Integer()),
            or_(STEPS.c.label_count == 0, ~lacks_label),
        )
        .order_by(STEPS.c.ready_at, STEPS.c.id)
        .limit(bindparam("most", type_=Integer()))
        .with_for_update(skip_locked=True, of=STEPS)
        .cte("ready")
        .prefix_with("MATERIALIZED")
    )
    sources, target = STEP_TRANSITIONS[StepEvent.CLAIM]
    return Prepared(
        update(STEPS)
        .where(STEPS.c.id.in_(select(ready.c.id)), _stands_in(sources))
        .values(
            state=target,
            attempt=STEPS.c.attempt + 1,
            claimed_at=now,
            last_seen_at=now,
            acked_at=None,
            started_at=None,
            phase=None,
            exit_code=None,
            reason=None,
            image_digest=None,
            log_size=0,
            **new_values(STEPS, ["runner_id", "request_id"]),
        )
        .returning(*STEPS.c)
    )


_CLAIM = _build_claim(STEPS.c.state == StepState.READY)
_CLAIM_OF_TENANT = _build_claim(  # along a queue of its own, whose index wants the state written out
    STEPS.c.tenant_id == given(STEPS.c.tenant_id), STEPS.c.state == literal_column(f"'{StepState.READY}'")
)


def insert_steps(
    tx: Session,
    steps: Sequence[dict[str, Any]],
    labels: Sequence[dict[str, Any]],
    dependencies: Sequence[dict[str, Any]],
) -> None:
    """The steps of one build; each is given the tenant of their project, which decides who may take it."""
    connection = tx.connection()
    tenant_id = connection.execute(_TENANT, {"the_id": steps[0]["project_id"]}).scalar_one()
    connection.execute(insert(STEPS), [{**step, "tenant_id": tenant_id} for step in steps])
    if labels:
        connection.execute(insert(LABELS), list(labels))
    if dependencies:
        connection.execute(insert(DEPENDENCIES), list(dependencies))


def never_claimed(*, is_ready: bool, now: datetime) -> dict[str, Any]:
    """How a new row begins, whatever its step says: everything that is not named here is unset."""
    return {
        "state": StepState.READY if is_ready else StepState.PENDING,
        "ready_at": now if is_ready else None,
        "attempt": 0,
        "infra_retries": 0,
        "log_size": 0,
    }


def find_step(tx: Session, step_id: str) -> Found | None:
    return _FIND.first(tx, {"the_id": step_id})


def get_step(tx: Session, step_id: str) -> Found:
    row = find_step(tx, step_id)
    if row is None:
        raise NotFound("no such step")
    return row


def list_steps(tx: Session, build_id: str) -> list[Row[Any]]:
    """The steps of a build in the workflow's order, each as its latest row shows it."""
    return list(tx.connection().execute(_LIST, {"the_build_id": build_id}).all())


def claim_steps(
    tx: Session,
    *,
    runner_id: str,
    request_id: str,
    labels: Sequence[str],
    only_labelled: bool,
    limit: int,
    now: datetime,
    tenant_id: str | None = None,
) -> list[Found]:
    """Give up to `limit` ready steps to this runner, each with a new attempt, oldest first.

    Only steps of this tenant, if the runner serves but one.
    """
    which = {"now": now, "labels": list(labels), "fewest_labels": int(only_labelled), "most": limit}
    values = as_new({"runner_id": runner_id, "request_id": request_id})
    claim = _CLAIM if tenant_id is None else _CLAIM_OF_TENANT
    of_tenant = {} if tenant_id is None else {"the_tenant_id": tenant_id}
    return _in_the_order_of_the_queue(claim.all(tx, which | of_tenant | values))


def _in_the_order_of_the_queue(claimed: Sequence[Found]) -> list[Found]:
    """Sorted here: asked for it, SQLite would walk all that anybody has claimed."""
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


def list_claims(tx: Session, *, runner_id: str, request_id: str) -> list[Found]:
    """What this request has already got and not yet used."""
    which = {"the_runner_id": runner_id, "the_request_id": request_id}
    return _in_the_order_of_the_queue(_CLAIMS.all(tx, which))


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
    must not act on what was true when it looked. What was told to stop is never made ready again.
    """
    which: dict[str, Any] = {"the_id": step_id}
    if attempt is not None:
        which["the_attempt"] = attempt
    if unheard_since is not None:
        which["the_last_seen_at"] = unheard_since
    statement = _move(event, tuple(values), tuple(which), attempt_after)
    return statement.run(tx, which | as_new(values)) == 1


def move_each(tx: Session, event: StepEvent, moves: Sequence[tuple[Any, dict[str, Any]]]) -> bool:
    """`move_step` for each of these steps under the attempt it has here, with values of its own.

    True when all have moved; when not, some may have, and the transaction has to be rolled back.
    """
    statement = _move_alike(event, tuple(moves[0][1]))
    moved = sum(
        statement.run(tx, {"any_id": ids, "the_attempt": attempt} | as_new(values))
        for ids, attempt, values in alike(moves)
    )
    return moved == len(moves)


@functools.cache
def _move_alike(event: StepEvent, names: tuple[str, ...]) -> Prepared:
    sources, target = STEP_TRANSITIONS[event]
    conditions = (given_any(STEPS.c.id), STEPS.c.attempt == given(STEPS.c.attempt), _stands_in(sources))
    return Prepared(update(STEPS).where(*conditions).values(state=target, **new_values(STEPS, names)))


@functools.cache
def _move(event: StepEvent, names: tuple[str, ...], which: tuple[str, ...], attempt_after: bool) -> Prepared:
    sources, target = STEP_TRANSITIONS[event]
    conditions = [_IS_IT, among(STEPS.c.state, sources)]
    if "the_attempt" in which:
        conditions.append(STEPS.c.attempt == given(STEPS.c.attempt))
    if "the_last_seen_at" in which:
        conditions.append(STEPS.c.last_seen_at <= given(STEPS.c.last_seen_at))
    if event is StepEvent.REQUEUE:
        conditions.append(STEPS.c.cancel_requested_at.is_(None))
    values: dict[str, Any] = {"state": target, **new_values(STEPS, names)}
    if attempt_after:
        values["attempt"] = STEPS.c.attempt + 1
    return Prepared(update(STEPS).where(*conditions).values(values))


def change_attempt(tx: Session, step_id: str, attempt: int, **values: Any) -> bool:
    """Change facts of a leased step without moving it; False when the attempt is no longer current."""
    which = {"the_id": step_id, "the_attempt": attempt}
    return _change(tuple(values)).run(tx, which | as_new(values)) == 1


@functools.cache
def _change(names: tuple[str, ...]) -> Prepared:
    is_current = STEPS.c.attempt == given(STEPS.c.attempt)
    return Prepared(
        update(STEPS)
        .where(_IS_IT, is_current, among(STEPS.c.state, LEASED_STEP_STATES))
        .values(new_values(STEPS, names))
    )


def set_log_size(tx: Session, step_id: str, attempt: int, size: int) -> None:
    """The log of this attempt, which no runner writes any more, was ended with a line."""
    is_it = (STEPS.c.id == step_id, STEPS.c.attempt == attempt)
    tx.connection().execute(update(STEPS).where(*is_it).values(log_size=size))


def touch_steps(tx: Session, step_ids: Sequence[str], runner_id: str, *, now: datetime) -> None:
    """These attempts were heard of: acknowledged if they were not, and alive."""
    which = {"any_id": list(step_ids), "the_runner_id": runner_id}
    tx.connection().execute(_TOUCH, which | as_new({"last_seen_at": now}))


def lock_steps(tx: Session, step_ids: Sequence[str]) -> None:
    """Hold these steps until the transaction ends, taken in the order of their ids."""
    if needs_locks(tx):
        _LOCK_EACH.all(tx, {"any_id": step_ids})


def by_build(step: Any) -> tuple[str, str]:
    """The order in which who holds several builds takes them, step by step."""
    return step.build_id, step.id


def list_steps_by_id(tx: Session, step_ids: Sequence[str]) -> dict[str, Found]:
    if not step_ids:
        return {}
    return {row.id: row for row in _BY_ID.all(tx, {"any_id": step_ids})}


def unblock_first(tx: Session, build_id: str, *, now: datetime) -> None:
    """Let runners have the steps of this build that depend on none."""
    sources, target = STEP_TRANSITIONS[StepEvent.UNBLOCK]
    tx.connection().execute(
        update(STEPS)
        .where(STEPS.c.build_id == build_id, STEPS.c.dependency_count == 0, among(STEPS.c.state, sources))
        .values(state=target, ready_at=now)
    )


def list_dependents(tx: Session, step_ids: Sequence[str]) -> dict[str, list[StepState]]:
    """The waiting steps right behind these, each with the states of all its dependencies."""
    states: dict[str, list[StepState]] = {}
    for step_id, state in tx.connection().execute(_DEPENDENTS, {"any_depends_on_id": list(step_ids)}):
        states.setdefault(step_id, []).append(StepState(state))
    return states


def move_steps(tx: Session, step_ids: Iterable[str], event: StepEvent, **values: Any) -> list[str]:
    """Apply `event` to those of the steps that stand where it may; returns their ids."""
    wanted = list(step_ids)
    if not wanted:
        return []
    moved = tx.connection().execute(_move_any(event, tuple(values)), {"any_id": wanted} | as_new(values))
    return [row.id for row in moved]


@functools.cache
def _move_any(event: StepEvent, names: tuple[str, ...]) -> UpdateBase:
    sources, target = STEP_TRANSITIONS[event]
    return (
        update(STEPS)
        .where(given_any(STEPS.c.id), _stands_in(sources))
        .values(state=target, **new_values(STEPS, names))
        .returning(STEPS.c.id)
    )


def count_states(tx: Session, build_id: str) -> dict[StepState, int]:
    """How many rows stand where; of those that have not ended all count, as each is its step's latest."""
    which = {"the_build_id": build_id}
    return {StepState(found.state): found.count for found in _COUNT_STATES.all(tx, which)}


def find_first_reason(tx: Session, build_id: str) -> str | None:
    """Why the build's first failed step failed; others may have ended well after it."""
    statement = (
        select(STEPS.c.reason)
        .where(STEPS.c.build_id == build_id, STEPS.c.state == StepState.FAILED, IS_LATEST)
        .order_by(STEPS.c.finished_at, STEPS.c.position)
        .limit(1)
    )
    return tx.connection().execute(statement).scalar_one_or_none()


def list_dependencies(tx: Session, build_id: str) -> dict[str, list[str]]:
    """Every arrow of the build: step id to the ids it depends on directly."""
    arrows: dict[str, list[str]] = {}
    for step_id, depends_on_id in tx.connection().execute(_ARROWS, {"the_build_id": build_id}):
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
        .order_by(STEPS.c.claimed_at, STEPS.c.id)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())


def list_unacknowledged_of(tx: Session, runner_id: str) -> list[Row[Any]]:
    """The claims of this runner that no heartbeat has named."""
    statement = select(STEPS).where(
        STEPS.c.runner_id == runner_id, STEPS.c.state == StepState.CLAIMED, STEPS.c.acked_at.is_(None)
    )
    return list(tx.connection().execute(statement).all())


def list_leased_of(tx: Session, runner_id: str) -> list[Row[Any]]:
    """What this runner holds, build by build: who takes several of these locks takes them in this order."""
    statement = (
        select(STEPS)
        .where(STEPS.c.runner_id == runner_id, among(STEPS.c.state, LEASED_STEP_STATES))
        .order_by(STEPS.c.build_id, STEPS.c.id)
    )
    return list(tx.connection().execute(statement).all())


def list_silent(tx: Session, *, before: datetime, exclusive_until: datetime, limit: int) -> list[Row[Any]]:
    """Acknowledged attempts whose runner was last heard before `before`, the longest silent first.

    Exclusive ones only if it was last heard at `exclusive_until` at the latest. What is to be cancelled is
    on its way to cancelled, and must not be made ready again.
    """
    statement = (
        select(STEPS)
        .where(
            STEPS.c.state.in_(LEASED_STEP_STATES),
            STEPS.c.acked_at.is_not(None),
            STEPS.c.last_seen_at < before,
            or_(~STEPS.c.exclusive, STEPS.c.last_seen_at <= exclusive_until),
            STEPS.c.cancel_requested_at.is_(None),
            STEPS.c.runner_id.is_not(None),
        )
        .order_by(STEPS.c.last_seen_at, STEPS.c.id)
        .limit(limit)
    )
    return list(tx.connection().execute(statement).all())
