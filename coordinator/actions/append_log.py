"""Bytes of a step's log arrive at an offset."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlmodel import Session

from coordinator.actions.leased_step import (
    LeaseProof,
    get_attempt,
    get_leased_step,
    hold_attempt,
    require_leased,
)
from coordinator.actions.revive_step import revive_step
from coordinator.errors import LogConflict, LogGap, StaleAttempt
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import attempts, logs, steps
from shared.protocol import Action
from shared.states import StepState

TOLD = (StepState.SUCCEEDED, StepState.FAILED)
GAP = b"\n[buildmill] error: bytes are missing here, behind byte %d: the runner could not deliver the rest\n"
NOTICE = b"\n[buildmill] the log limit of %d bytes is reached; what follows is not kept\n"


@dataclass(frozen=True)
class Appended:
    """How long the log is now; `is_full` when it takes no more. The log of `build_id` has grown by it."""

    size: int
    action: Action
    is_full: bool = False
    build_id: str | None = None


def append_log(
    tx: Session,
    site: Site,
    caller: Caller,
    step_id: str,
    proof: LeaseProof,
    *,
    offset: int,
    data: bytes,
    now: datetime,
) -> Appended:
    """Store what is new of `data`. Bytes sent twice change nothing; other bytes are a LogConflict."""
    step = hold_attempt(tx, site, caller, step_id, proof)
    if step.state == StepState.READY and revive_step(tx, caller, step, now=now):
        step = get_attempt(tx, site, caller, step_id, proof)  # its log was quicker than its heartbeat
    if StepState(step.state) in TOLD and offset + len(data) <= step.log_size:
        return Appended(step.log_size, Action.CONTINUE)  # a restarted runner that has not heard its answer
    require_leased(step)
    row = attempts.find_attempt(tx, step_id, proof.attempt)
    action = Action.CANCEL if step.cancel_requested_at else Action.CONTINUE
    if row is not None and row.log_state == "truncated":
        return Appended(step.log_size, action, is_full=True)
    path = site.logs.path(step.build_id, step.id, step.attempt)
    size = min(step.log_size, site.logs.size(path))  # a crash of the machine may have eaten the end
    if offset > size:
        if size < step.log_size:
            _set_size(tx, step, size, now=now)
            return Appended(size, action)
        raise LogGap(size)
    fresh = _fresh_part(site, path, size, offset, data)
    return store_log(tx, site, step, fresh, size=size, action=action, now=now)


def store_log(
    tx: Session, site: Site, step: Any, data: bytes, *, size: int, action: Action, now: datetime
) -> Appended:
    """Append `data` to the log of the step's current attempt, up to the limit."""
    limit = site.settings.log_limit
    is_full = size + len(data) > limit
    kept = data[: max(0, limit - size)] + (NOTICE % limit) if is_full else data
    if kept:
        path = site.logs.path(step.build_id, step.id, step.attempt)
        site.logs.write(path, size, kept)
        _set_size(tx, step, size + len(kept), now=now)
        logs.insert_append(tx, step, offset=size, length=len(kept), now=now)
    if is_full:
        attempts.change_attempt(tx, step.id, step.attempt, log_state="truncated")
    return Appended(size + len(kept), action, is_full, step.build_id if kept else None)


def end_with_gap(tx: Session, site: Site, step: Any, line: bytes, *, now: datetime) -> None:
    """The runner has more of the log, or may have: the log ends with a line that says behind which byte."""
    row = attempts.find_attempt(tx, step.id, step.attempt)
    if row is not None and row.log_state == "open":
        size = step.log_size
        store_log(tx, site, step, line % size, size=size, action=Action.CONTINUE, now=now)


def forget_log(tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof) -> None:
    """The stored bytes are not those that were sent: begin anew. A log that has reached its limit stays."""
    step = get_leased_step(tx, site, caller, step_id, proof)
    row = attempts.find_attempt(tx, step_id, proof.attempt)
    if row is not None and row.log_state == "open":
        steps.change_attempt(tx, step_id, step.attempt, log_size=0)


def _fresh_part(site: Site, path: Path, size: int, offset: int, data: bytes) -> bytes:
    overlap = min(size - offset, len(data))
    if overlap and site.logs.read(path, offset, overlap) != data[:overlap]:
        raise LogConflict(size)
    return data[overlap:]


def _set_size(tx: Session, step: Any, size: int, *, now: datetime) -> None:
    if not steps.change_attempt(tx, step.id, step.attempt, log_size=size, last_seen_at=now):
        raise StaleAttempt("the step has moved on")
