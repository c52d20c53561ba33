"""When a build will probably end."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.rules.estimate import estimate_left
from coordinator.store import durations, rounds
from shared.states import BuildState, StepState

IN_PROGRESS = frozenset({BuildState.QUEUED, BuildState.RUNNING})


def estimate_completion(tx: Session, build: Any, steps: Sequence[Any], *, now: datetime) -> datetime | None:
    """The moment at which the build ends if its steps go on as they usually do; never one in the past.

    None when the build is not in progress, or when one of the steps that it still needs has no history.
    """
    if BuildState(build.state) not in IN_PROGRESS:
        return None
    unfinished = {step.name for step in steps if not StepState(step.state).is_final}
    history = durations.list_recent_times(tx, build.project_id, build.workflow_id, unfinished)
    left = estimate_left(steps, rounds.list_latest_dependencies(tx, build.id), history, now=now)
    return None if left is None else now + left
