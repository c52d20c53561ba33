"""An attempt ends without the word of its runner, and its log with a line that says so."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import structlog
from sqlmodel import Session

from coordinator.errors import Unavailable
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import attempts, logs, steps
from shared.states import StepState

log = structlog.get_logger()

LOST = "lost"  # the outcome of an attempt whose runner fell silent, or was revoked
UNENDED = b"\n[buildmill] error: bytes may be missing here, behind byte %d: no runner said that it is all\n"


def end_unheard(
    tx: Session,
    site: Site,
    step: Any,
    event: StepEvent,
    *,
    outcome: str,
    reason: str | None,
    now: datetime,
    detail: str | None = None,
    unheard_since: datetime | None = None,
) -> bool:
    """Move the step and close its attempt; False when it has moved on, or was heard after `unheard_since`."""
    whole = write_unended(tx, site, step)
    moved = steps.move_step(
        tx,
        step.id,
        event,
        attempt=step.attempt,
        unheard_since=unheard_since,
        finished_at=now,
        reason=reason,
        log_size=whole,
    )
    if moved:
        close_unheard(tx, step, whole, outcome=outcome, reason=reason, detail=detail, now=now)
    return moved


def close_unheard(tx: Session, step: Any, whole: int, *, now: datetime, **ended: Any) -> None:
    """Close the attempt of a step as it stood before it moved, its log being `whole` bytes long now.

    What never began and has said nothing has a log that is complete.
    """
    if whole > step.log_size:
        logs.insert_append(tx, step, offset=step.log_size, length=whole - step.log_size, now=now)
    facts = {"finished_at": now, "log_size": whole, **ended}
    attempts.end_each(tx, [(step, facts)], has_gap=_may_lack_bytes(step))


def close_log_before(tx: Session, site: Site, step: Any, *, now: datetime) -> None:
    """The attempt that ran before this one was lost, and its runner cannot go on any more: its log says so.

    The caller holds the build.
    """
    _close_last_begun(tx, site, step, until=step.attempt - 1, now=now)


def close_lost_logs(tx: Session, site: Site, ended: Sequence[Any], *, now: datetime) -> None:
    """`close_log_before` for steps that have ended, and that no other attempt will start.

    `ended` has them as they were found, or as they are: what ran at its end has closed what was lost before
    it when it started, and its own log at its end. The caller holds the build.
    """
    for step in ended:
        if not StepState(step.state).is_leased:
            _close_last_begun(tx, site, step, until=step.attempt, now=now)
        elif step.started_at is None:
            _close_last_begun(tx, site, step, until=step.attempt - 1, now=now)


def _close_last_begun(tx: Session, site: Site, step: Any, *, until: int, now: datetime) -> None:
    former = _last_begun(tx, step, until=until) if until else None
    if former is None or former.outcome != LOST or former.log_state != "gap":
        return
    size: int = former.log_size
    whole = _write_line(site, step, former.attempt, size)
    if whole > size:
        logs.insert_append(tx, step, attempt=former.attempt, offset=size, length=whole - size, now=now)
        attempts.change_attempt(tx, step.id, former.attempt, log_size=whole)
        if former.attempt == step.attempt:
            steps.set_log_size(tx, step.id, step.attempt, whole)


def _last_begun(tx: Session, step: Any, *, until: int) -> Any:
    """Of claims that came to nothing in between there is nothing to say; what ran before has been told."""
    begun = [
        row
        for row in attempts.list_attempts(tx, [step.id]).get(step.id, [])
        if row.attempt <= until and row.started_at is not None
    ]
    return begun[-1] if begun else None


def write_unended(tx: Session, site: Site, step: Any) -> int:
    """Write the line that ends the log of a runner nobody waits for any more; its size with it.

    It counts only when the step is moved with that size; until then the next append overwrites it.
    """
    size: int = step.log_size
    row = attempts.find_attempt(tx, step.id, step.attempt)
    if row is None or row.log_state != "open" or not _may_lack_bytes(step):
        return size
    return _write_line(site, step, step.attempt, size)


def _may_lack_bytes(step: Any) -> bool:
    """Its script may have run, or its preparation has said something that may not be all."""
    return step.started_at is not None or step.log_size > 0


def _write_line(site: Site, step: Any, attempt: int, size: int) -> int:
    line = UNENDED % size
    try:
        site.logs.write(site.logs.path(step.build_id, step.id, attempt), size, line)
    except (OSError, Unavailable) as error:  # the step ends all the same, and its log is known to have a gap
        log.warning("log_not_ended", step=step.id, attempt=attempt, cause=str(error))
        return size
    return size + len(line)
