"""How far a build is, and when it will probably end."""

from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Session

from coordinator.actions.estimate_completion import estimate_completion
from coordinator.actions.show_build import get_visible_build
from coordinator.rules.access import Caller
from coordinator.store import steps
from coordinator.tables import Build
from shared.states import StepState


@dataclass(frozen=True)
class Progress:
    """A build with how many of its steps have ended."""

    build: Build
    ended_steps: int
    all_steps: int
    estimated_completion: datetime | None

    @property
    def percentage(self) -> int:
        return 100 * self.ended_steps // self.all_steps


def show_progress(tx: Session, caller: Caller, build_id: str, *, now: datetime) -> Progress:
    """Each step counts once, by its latest row."""
    build = get_visible_build(tx, caller, build_id)
    rows = steps.list_steps(tx, build_id)
    ended = sum(StepState(row.state).is_final for row in rows)
    return Progress(build, ended, len(rows), estimate_completion(tx, build, rows, now=now))
