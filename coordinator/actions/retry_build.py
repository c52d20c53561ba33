"""A build runs again: a new round, in which what has succeeded and what still runs is kept."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlmodel import Session

from coordinator.actions.refuse_expired import has_expired
from coordinator.actions.show_build import BuildView, get_visible_build, show_build
from coordinator.errors import Conflict
from coordinator.rules.access import Caller
from coordinator.rules.transitions import BuildEvent
from coordinator.store import audit, builds, projects, rounds, steps
from coordinator.tables import Build
from shared.ids import new_id
from shared.states import BuildState, StepState

MAX_ROWS = 20_000  # of steps over all rounds: what one answer can show and one claim can look through


class StepsToRetry(StrEnum):
    """Which steps a retry runs again."""

    FAILED = "failed"
    ALL = "all"


def retry_build(
    tx: Session, caller: Caller, build_id: str, which: StepsToRetry, *, now: datetime
) -> BuildView:
    """Open the next round and show it; a Conflict when nothing can run again or the build is being stopped.

    Of two retries at the same moment the second finds nothing left to run again.
    """
    build = _hold_build(tx, caller, build_id)
    _require_retryable(build)
    current = steps.list_steps(tx, build_id)
    arrows = rounds.list_latest_dependencies(tx, build_id)
    again = _to_run_again(current, arrows, which)
    _require_any(again, which)
    _require_outputs(build, [row for row in current if row.id not in again])
    _require_room(tx, build_id, len(again))
    _open_round(tx, build, now=now)
    carried = rounds.carry_steps(tx, build_id, round_number=build.round + 1)
    fresh = _insert_rows(tx, build, current, arrows, again, now=now)
    rounds.turn_arrows(tx, build_id, {row.id: arrows.get(row.id, ()) for row in carried}, fresh)
    if any(row.attempt for row in carried):
        builds.begin_builds(tx, {build_id}, now=now)
    audit.record(
        tx,
        caller,
        "build.retried",
        now=now,
        project_id=build.project_id,
        buildId=build_id,
        round=build.round + 1,
        steps=str(which),
        rerun=len(again),
        carried=len(carried),
        stateBefore=build.state,
        reasonBefore=build.reason,
    )
    tx.expire_all()
    return show_build(tx, caller, build_id)


def _hold_build(tx: Session, caller: Caller, build_id: str) -> Build:
    """The build, with its project held too: neither may go while something new is made in it."""
    projects.lock_project(tx, get_visible_build(tx, caller, build_id).project_id)
    builds.lock_build(tx, build_id)
    tx.expire_all()
    return get_visible_build(tx, caller, build_id)


def _require_retryable(build: Build) -> None:
    state = BuildState(build.state)
    if state is BuildState.CREATED:
        raise Conflict("the build has not been started")
    # a build that has not ended and knows its reason has run out of time
    if state is BuildState.CANCELLING or (build.reason is not None and not state.is_final):
        raise Conflict("the build is being stopped; it can be retried when it has ended")


def _require_any(again: Collection[str], which: StepsToRetry) -> None:
    if again:
        return
    if which is StepsToRetry.FAILED:
        raise Conflict("there is nothing to run again: no step has failed, was cancelled or was skipped")
    raise Conflict("there is nothing to run again: no step has ended but those that one which runs needs")


def _require_outputs(build: Build, kept: Sequence[Any]) -> None:
    if any(row.spec["outputPaths"] and has_expired(build, row.round) for row in kept):
        raise Conflict("the outputs of the steps that have succeeded have expired; all steps can be retried")


def _require_room(tx: Session, build_id: str, more: int) -> None:
    rows = rounds.count_rows(tx, build_id)
    if rows + more > MAX_ROWS:
        raise Conflict(f"the build has run {rows} steps in all its rounds; {MAX_ROWS} are the most")


def _to_run_again(
    current: Sequence[Any], arrows: Mapping[str, Sequence[str]], which: StepsToRetry
) -> set[str]:
    """The ids of the rows that are replaced: rows that have ended.

    What has begun, or may begin at any moment, never depends on one of them, so that what it was given
    stays what counts; a step that still waits for others can wait for the new ones.
    """
    unfinished = {row.id for row in current if not StepState(row.state).is_final}
    if which is StepsToRetry.ALL:
        begun = {row.id for row in current if row.id in unfinished and row.state != StepState.PENDING}
        return {row.id for row in current} - unfinished - _with_linked(begun, arrows)
    unsuccessful = {row.id for row in current if row.state != StepState.SUCCEEDED} - unfinished
    dependents: dict[str, list[str]] = defaultdict(list)
    for step_id in (row.id for row in current):
        for other in arrows.get(step_id, ()):
            dependents[other].append(step_id)
    return _with_linked(unsuccessful, dependents) - unfinished


def _with_linked(step_ids: Collection[str], links: Mapping[str, Sequence[str]]) -> set[str]:
    """The steps and all that can be reached from them."""
    found = set(step_ids)
    waiting = list(step_ids)
    while waiting:
        fresh = set(links.get(waiting.pop(), ())) - found
        found |= fresh
        waiting += fresh
    return found


def _open_round(tx: Session, build: Build, *, now: datetime) -> None:
    moved = builds.move_build(
        tx,
        build.id,
        BuildEvent.RETRY,
        now=now,
        round=build.round + 1,
        reason=None,
        cancel_id=None,
        cancel_requested_at=None,
        deadline_at=None,
        started_at=None,
        finished_at=None,
    )
    if not moved:
        raise Conflict(f"the build is {build.state}")


def _insert_rows(
    tx: Session,
    build: Build,
    current: Sequence[Any],
    arrows: Mapping[str, Sequence[str]],
    again: Collection[str],
    *,
    now: datetime,
) -> dict[str, str]:
    """A fresh row for each of `again`, of what the build copied when it was made; old ids to new ones."""
    fresh = {row.id: new_id() for row in current if row.id in again}
    states = {row.id: row.state for row in current}
    rows, labels, dependencies = [], [], []
    for row in current:
        if row.id not in again:
            continue
        behind = arrows.get(row.id, ())
        is_ready = all(other not in fresh and states[other] == StepState.SUCCEEDED for other in behind)
        rows.append(
            {
                "id": fresh[row.id],
                "build_id": build.id,
                "project_id": row.project_id,
                "name": row.name,
                "round": build.round + 1,
                "position": row.position,
                "rank": row.rank,
                "spec": row.spec,
                "image_url": row.image_url,
                "label_count": row.label_count,
                "dependency_count": row.dependency_count,
                "exclusive": row.exclusive,
                "queue_limit_s": row.queue_limit_s,
                **steps.never_claimed(is_ready=is_ready, now=now),
            }
        )
        labels += [{"step_id": fresh[row.id], "label": label} for label in row.spec["labels"]]
        dependencies += [
            {"step_id": fresh[row.id], "depends_on_id": fresh.get(other, other), "build_id": build.id}
            for other in behind
        ]
    steps.insert_steps(tx, rows, labels, dependencies)
    return fresh
