"""How long a build still takes, judged by how long its steps took lately."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from shared.states import StepState

NOTHING = timedelta()
LEAST_SHARE = 0.1  # of what is usual: so much is always left of what is taking longer than that


@dataclass(frozen=True)
class StepTimes:
    """The three parts of a step's way: it waits for a runner, is prepared by it, and runs."""

    waited: timedelta
    prepared: timedelta
    ran: timedelta


def estimate_left(
    steps: Iterable[Any],
    arrows: Mapping[str, Sequence[str]],
    history: Mapping[str, Sequence[StepTimes]],
    *,
    now: datetime,
) -> timedelta | None:
    """The longest way through the steps that have not ended; None when one of them has no history.

    `arrows` leads from a step's id to those it depends on, `history` has the former runs of a step by its
    name. Of several rows of one name the latest round counts.
    """
    ends_after: dict[str, timedelta] = {}
    for step in sorted(_latest(steps), key=lambda step: step.rank):  # what it depends on comes before it
        if StepState(step.state).is_final:
            continue
        runs = history.get(step.name)
        if not runs:
            return None
        begins_after = max(
            (ends_after.get(other, NOTHING) for other in arrows.get(step.id, ())), default=NOTHING
        )
        ends_after[step.id] = begins_after + step_left(step, usual_times(runs), now=now)
    return max(ends_after.values(), default=NOTHING)


def step_left(step: Any, usual: StepTimes, *, now: datetime) -> timedelta:
    """How long this step still takes, once all that it depends on has ended."""
    match StepState(step.state):
        case StepState.RUNNING:
            return _left(usual.ran, step.started_at, now)
        case StepState.CLAIMED:
            return _left(usual.prepared, step.claimed_at, now) + usual.ran
        case StepState.READY:
            since = may_be_taken_at(step)
            pause = NOTHING if since is None else max(since - now, NOTHING)  # before its next attempt
            return pause + _left(usual.waited, since, now) + usual.prepared + usual.ran
        case StepState.PENDING:
            return usual.waited + usual.prepared + usual.ran
        case _:
            return NOTHING


def usual_times(runs: Sequence[StepTimes]) -> StepTimes:
    """The middle of each part: one run that took very long, or ended at once, moves it little."""
    return StepTimes(
        waited=_middle([run.waited for run in runs]),
        prepared=_middle([run.prepared for run in runs]),
        ran=_middle([run.ran for run in runs]),
    )


def may_be_taken_at(step: Any) -> datetime | None:
    """From when on a runner may take the step; `ready_at` knows nothing of its later attempts."""
    moments = [moment for moment in (step.ready_at, step.not_before) if moment is not None]
    return max(moments, default=None)


def _latest(steps: Iterable[Any]) -> Iterable[Any]:
    found: dict[str, Any] = {}
    for step in steps:
        if step.name not in found or step.round > found[step.name].round:
            found[step.name] = step
    return found.values()


def _left(usual: timedelta, since: datetime | None, now: datetime) -> timedelta:
    used = NOTHING if since is None else max(now - since, NOTHING)
    return max(usual - used, usual * LEAST_SHARE)


def _middle(durations: Sequence[timedelta]) -> timedelta:
    return timedelta(seconds=median(duration.total_seconds() for duration in durations))
