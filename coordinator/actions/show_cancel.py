"""The receipt of a cancellation: which attempts had to stop, and what is proved of each."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.actions.refuse_expired import refuse_expired
from coordinator.actions.show_build import get_visible_build
from coordinator.errors import Expired, NotFound
from coordinator.rules.access import Caller
from coordinator.store import cancels
from shared.states import StepState

PROOF_PATIENCE = timedelta(seconds=60)


@dataclass(frozen=True)
class StoppedStep:
    """One step of a receipt; `is_confirmed`: it is certain that nothing of the attempt is left."""

    row: Any
    requested_at: datetime
    is_confirmed: bool
    is_waited_for: bool

    @property
    def state(self) -> str:
        """How the step stands, or how an attempt ended that is not its current one."""
        is_past = self.row.attempt not in (cancels.NO_ATTEMPT, self.row.current_attempt)
        return str((is_past and self.row.outcome) or self.row.state)


@dataclass(frozen=True)
class CancelView:
    """A cancellation and everything shown with it."""

    id: str
    build_id: str
    requested_at: datetime
    steps: tuple[StoppedStep, ...]

    @property
    def is_done(self) -> bool:
        return not any(step.is_waited_for for step in self.steps)

    @property
    def is_confirmed(self) -> bool:
        return all(step.is_confirmed for step in self.steps)


def show_cancel(tx: Session, caller: Caller, cancel_id: str, *, now: datetime) -> CancelView:
    """The receipt as it stands now; NotFound for whoever may not see its build."""
    try:
        cancel = cancels.get_cancel(tx, cancel_id)
    except NotFound:
        refuse_expired(tx, caller, cancel_id)
        raise
    try:
        get_visible_build(tx, caller, cancel.build_id)
    except Expired as error:
        raise Expired("this cancel has expired or was deleted") from error
    except NotFound as error:
        raise type(error)("no such cancellation") from error
    rows = cancels.list_cancel_steps(tx, cancel_id)
    stopped = tuple(_stopped(row, cancel.requested_at, now=now) for row in rows)
    return CancelView(cancel.id, cancel.build_id, cancel.requested_at, stopped)


def _stopped(row: Any, cancelled_at: datetime, *, now: datetime) -> StoppedStep:
    requested_at = row.cancel_requested_at or cancelled_at
    is_confirmed = _is_confirmed(row)
    is_ended = StepState(row.state).is_final
    ended_at = max(row.attempt_finished_at or row.finished_at or requested_at, requested_at)
    is_hopeful = not is_confirmed and now - ended_at < PROOF_PATIENCE
    return StoppedStep(row, requested_at, is_confirmed, is_waited_for=not is_ended or is_hopeful)


def _is_confirmed(row: Any) -> bool:
    if row.cleaned_at is not None:
        return not row.leftovers
    if row.attempt == cancels.NO_ATTEMPT or row.runner_id is None:
        return StepState(row.state).is_final
    # a claim that its runner never spoke of has ended before anything of it could begin
    is_untouched = row.attempt == row.current_attempt and row.acked_at is None and row.started_at is None
    return is_untouched and StepState(row.state).is_final
