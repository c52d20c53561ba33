"""A runner is about to let the script run."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from sqlmodel import Session

from coordinator.actions.end_unheard import close_log_before
from coordinator.actions.leased_step import LeaseProof, hold_leased_step
from coordinator.errors import StaleAttempt
from coordinator.rules.access import Caller
from coordinator.rules.limits import grace_seconds, run_allowance, timeout_seconds
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import attempts, audit, steps
from shared.protocol import Start, StartAnswer
from shared.states import StepState


def start_step(
    tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof, said: Start, *, now: datetime
) -> StartAnswer:
    """Answer `go` once the step is recorded as running, or `cancel`. Asked again, the same answer."""
    step = hold_leased_step(tx, site, caller, step_id, proof)  # once a cancel was answered nothing may start
    if step.cancel_requested_at is not None:
        return _answer("cancel", step)
    if step.state == StepState.RUNNING:
        return _answer("go", step)
    record_starts(tx, caller, [(step, said)], now=now)
    if proof.attempt > 1:
        close_log_before(tx, site, step, now=now)
    return _answer("go", step)


def is_plain_start(step: Any) -> bool:
    """True for the first attempt of a step that was claimed and is to run: nothing else has to be done."""
    return step.state == StepState.CLAIMED and step.attempt == 1 and step.cancel_requested_at is None


def start_plainly(
    tx: Session, caller: Caller, starts: Sequence[tuple[Any, Start]], *, now: datetime
) -> list[StartAnswer]:
    """`start_step` for several that are plain, whose leases are proved and whose builds are held."""
    record_starts(tx, caller, starts, now=now)
    return [_answer("go", step) for step, _ in starts]


def record_starts(tx: Session, caller: Caller, starts: Sequence[tuple[Any, Start]], *, now: datetime) -> None:
    """Each of these claimed steps runs now; StaleAttempt when one of them has moved on."""
    facts = [(step, {"started_at": now, "image_digest": said.image_digest or None}) for step, said in starts]
    moves = [
        (
            step,
            {
                "phase": "running",
                "last_seen_at": now,
                "acked_at": step.acked_at or now,
                "deadline_at": now + run_allowance(step.spec),
                **known,
            },
        )
        for step, known in facts
    ]
    if not steps.move_each(tx, StepEvent.START, moves):
        raise StaleAttempt("the step has moved on")
    attempts.change_each(tx, facts)
    audit.record_each_step(tx, caller, "step.started", [(step, {}) for step, _ in starts], now=now)


def _answer(action: Literal["go", "cancel"], step: Any) -> StartAnswer:
    return StartAnswer(action=action, timeout_s=timeout_seconds(step.spec), grace_s=grace_seconds(step.spec))
