"""Where the log of a step stands."""

from dataclasses import dataclass
from pathlib import Path

from sqlmodel import Session

from coordinator.actions.show_build import get_visible_step
from coordinator.errors import Expired, NotFound
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import attempts
from shared.states import StepState


@dataclass(frozen=True)
class LogView:
    """A log as it stands: `size` bytes of the file may be read; more may come while `is_open`.

    It is that of one attempt, 0 while the step has none.
    """

    attempt: int
    path: Path
    size: int
    is_open: bool
    state: str
    sha256: str | None


def show_step_log(tx: Session, site: Site, caller: Caller, step_id: str, *, attempt: int | None) -> LogView:
    """The log of one attempt, by default the latest."""
    step, build = get_visible_step(tx, caller, step_id)
    number = step.attempt if attempt is None else attempt
    path = site.logs.path(step.build_id, step.id, number)
    row = attempts.find_attempt(tx, step.id, number) if number else None
    if row is None:
        if attempt is not None:
            raise NotFound("no such attempt")
        return LogView(number, path, 0, not StepState(step.state).is_final, "open", None)
    if step.round <= build.logs_expired_round:
        raise Expired("this log has expired")
    is_current = number == step.attempt
    size = step.log_size if is_current else row.log_size
    is_open = is_current and not StepState(step.state).is_final
    return LogView(number, path, size, is_open, row.log_state, row.log_sha256)
