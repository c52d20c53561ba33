"""The history of attempts: opened by a claim, ended once."""

import functools
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Update, case, insert, select, update
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.store.prepared import Found, Prepared
from coordinator.store.statements import alike, as_new, given, given_any, new_values
from coordinator.tables import StepAttempt, table_of

ATTEMPTS = table_of(StepAttempt)

_IS_IT = (ATTEMPTS.c.step_id == given(ATTEMPTS.c.step_id), ATTEMPTS.c.attempt == given(ATTEMPTS.c.attempt))
_ARE_THEY = (given_any(ATTEMPTS.c.step_id), ATTEMPTS.c.attempt == given(ATTEMPTS.c.attempt))
_OPENED = (
    "step_id",
    "attempt",
    "runner_id",
    "request_id",
    "claimed_at",
    "oom",
    "output_paths",
    "log_size",
    "log_state",
)
_INSERT = Prepared(insert(ATTEMPTS).values(new_values(ATTEMPTS, _OPENED)))
_FIND = Prepared(select(ATTEMPTS).where(*_IS_IT))
_USED = Prepared(
    select(ATTEMPTS.c.step_id)
    .where(
        ATTEMPTS.c.runner_id == given(ATTEMPTS.c.runner_id),
        ATTEMPTS.c.request_id == given(ATTEMPTS.c.request_id),
    )
    .limit(1)
)


def insert_attempts(tx: Session, steps: Sequence[Any], *, now: datetime) -> None:
    """One row for each step that has just been claimed."""
    rows = [
        {
            "step_id": step.id,
            "attempt": step.attempt,
            "runner_id": step.runner_id,
            "request_id": step.request_id,
            "claimed_at": now,
            "oom": False,
            "output_paths": [],
            "log_size": 0,
            "log_state": "open",
        }
        for step in steps
    ]
    if rows:
        _INSERT.run_each(tx, [as_new(row) for row in rows])


def find_attempt(tx: Session, step_id: str, attempt: int) -> Found | None:
    which = {"the_step_id": step_id, "the_attempt": attempt}
    return _FIND.first(tx, which)


def change_attempt(tx: Session, step_id: str, attempt: int, **values: Any) -> None:
    _change(tuple(values)).run(tx, {"any_step_id": [step_id], "the_attempt": attempt} | as_new(values))


def change_each(tx: Session, changes: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    """`change_attempt` for the current attempt of each of these steps."""
    _run_alike(tx, _change(tuple(changes[0][1])), changes)


def end_each(tx: Session, ends: Sequence[tuple[Any, dict[str, Any]]], *, has_gap: bool = False) -> None:
    """`change_each` for the last time: a log is whole, unless it was cut at the limit or has a gap."""
    _run_alike(tx, _end(tuple(ends[0][1]), "gap" if has_gap else "complete"), ends)


def _run_alike(tx: Session, statement: Prepared, changes: Sequence[tuple[Any, dict[str, Any]]]) -> None:
    for ids, attempt, values in alike(changes):
        statement.run(tx, {"any_step_id": ids, "the_attempt": attempt} | as_new(values))


@functools.cache
def _end(names: tuple[str, ...], otherwise: str) -> Prepared:
    log_state = case((ATTEMPTS.c.log_state == "truncated", "truncated"), else_=otherwise)
    return Prepared(_changing(names).values(log_state=log_state))


@functools.cache
def _change(names: tuple[str, ...]) -> Prepared:
    return Prepared(_changing(names))


def _changing(names: tuple[str, ...]) -> Update:
    return update(ATTEMPTS).where(*_ARE_THEY).values(new_values(ATTEMPTS, names))


def list_attempts(tx: Session, step_ids: Sequence[str]) -> dict[str, list[Row[Any]]]:
    """All attempts of these steps, first to last."""
    statement = select(ATTEMPTS).where(ATTEMPTS.c.step_id.in_(step_ids)).order_by(ATTEMPTS.c.attempt)
    attempts: dict[str, list[Row[Any]]] = {}
    for row in tx.connection().execute(statement):
        attempts.setdefault(row.step_id, []).append(row)
    return attempts


def was_request_used(tx: Session, *, runner_id: str, request_id: str) -> bool:
    """True when this acquire has been answered with steps before."""
    which = {"the_runner_id": runner_id, "the_request_id": request_id}
    return _USED.first(tx, which) is not None
