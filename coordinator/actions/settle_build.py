"""What follows when steps have ended: who may start, who never will, and whether the build is over."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.end_unheard import close_lost_logs
from coordinator.rules.access import SYSTEM
from coordinator.rules.transitions import BUILD_EVENT_OF_OUTCOME, StepEvent
from coordinator.site import Site
from coordinator.store import audit, builds, logs, rounds, steps
from shared.readiness import build_outcome, state_after
from shared.reasons import Reason
from shared.states import BuildState, StepState


def settle_build(
    tx: Session, site: Site, build_id: str, ended: Sequence[Any], *, reason: str | None, now: datetime
) -> BuildState | None:
    """Move on from the steps that have `ended`; returns how the build ended, if it did.

    They are given as they were found before they ended, or as they are. The caller holds the build's row: two
    steps that end together must not each see the other running.
    """
    close_lost_logs(tx, site, ended, now=now)
    counts = steps.count_states(tx, build_id)
    if counts.get(StepState.PENDING):
        _settle_dependents(tx, build_id, [step.id for step in ended], now=now)
        counts = steps.count_states(tx, build_id)
    if build_outcome(counts, is_cancelled=False) is None:
        return None  # something of it is still to come
    build = builds.lock_build(tx, build_id)
    if build.round > 1:
        counts = rounds.count_latest_states(tx, build_id)  # what was run again counts no more
    outcome = build_outcome(counts, is_cancelled=build.cancel_requested_at is not None)
    if outcome is None:
        return None
    event = BUILD_EVENT_OF_OUTCOME[outcome]
    said = _reason_of(tx, build_id, outcome, reason)
    if builds.move_build(tx, build_id, event, now=now, finished_at=now, reason=said):
        logs.end_log(tx, build_id, now=now)
        audit.record(
            tx,
            SYSTEM,
            "build.finished",
            now=now,
            project_id=build.project_id,
            buildId=build_id,
            state=str(outcome),
            reason=said,
        )
    return outcome


def _reason_of(tx: Session, build_id: str, outcome: BuildState, reason: str | None) -> str | None:
    """Why the build did not succeed: `reason` is that of the step that ended last."""
    if outcome is BuildState.SUCCEEDED:
        return None
    if outcome is BuildState.CANCELLED:
        return str(Reason.CANCELLED)
    return steps.find_first_reason(tx, build_id) or reason


def _settle_dependents(tx: Session, build_id: str, ended_steps: Sequence[str], *, now: datetime) -> None:
    waiting = steps.list_dependents(tx, ended_steps)
    next_states = {step_id: state_after(states) for step_id, states in waiting.items()}
    ready = [step_id for step_id, state in next_states.items() if state is StepState.READY]
    skipped = [step_id for step_id, state in next_states.items() if state is StepState.SKIPPED]
    steps.move_steps(tx, ready, StepEvent.UNBLOCK, ready_at=now)
    if skipped:
        lost = _with_all_behind(skipped, rounds.list_latest_dependencies(tx, build_id))
        steps.move_steps(tx, lost, StepEvent.SKIP, finished_at=now)


def _with_all_behind(step_ids: Sequence[str], dependencies: Mapping[str, Sequence[str]]) -> set[str]:
    """The steps and every step that depends on one of them, directly or not; `dependencies` points back."""
    dependents = defaultdict(list)
    for step_id, depends_on in dependencies.items():
        for other in depends_on:
            dependents[other].append(step_id)
    found = set(step_ids)
    waiting = list(step_ids)
    while waiting:
        fresh = set(dependents[waiting.pop()]) - found
        found |= fresh
        waiting += fresh
    return found
