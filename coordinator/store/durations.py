"""How long the steps of a workflow took lately: what an estimate is made from.

What is read is bounded: so many of a project's newest builds are looked at, and the steps of few of them, of
fewer still where builds have very many steps.
"""

from collections.abc import Collection, Iterator
from datetime import datetime, timedelta

from sqlalchemy import Select, select
from sqlmodel import Session

from coordinator.rules.estimate import StepTimes, may_be_taken_at
from coordinator.store.prepared import Found, Prepared
from coordinator.store.statements import given
from coordinator.tables import Build, Step, table_of
from shared.states import BuildState, StepState

BUILDS = table_of(Build)
STEPS = table_of(Step)

MOST_LOOKED_AT = 500
MOST_BUILDS = 10
FEWEST_BUILDS = 3
ENOUGH_ROWS = 2_000  # after which no further build is read


def _build_recent() -> Select[tuple[str]]:
    """The newest builds are read along the index of their numbers; only then is any of them left out."""
    newest = (
        select(BUILDS.c.id, BUILDS.c.number, BUILDS.c.workflow_id, BUILDS.c.state)
        .where(BUILDS.c.project_id == given(BUILDS.c.project_id))
        .order_by(BUILDS.c.number.desc())
        .limit(MOST_LOOKED_AT)
        .subquery("newest")
    )
    return (
        select(newest.c.id)
        .where(
            newest.c.workflow_id == given(BUILDS.c.workflow_id),
            newest.c.state == BuildState.SUCCEEDED,
        )
        .order_by(newest.c.number.desc())
        .limit(MOST_BUILDS)
    )


_RECENT = Prepared(_build_recent())
# By the build alone: given a state too, a database without statistics walks through all steps of that state.
_ROWS = Prepared(
    select(
        STEPS.c.name,
        STEPS.c.state,
        STEPS.c.runner_id,
        STEPS.c.ready_at,
        STEPS.c.not_before,
        STEPS.c.claimed_at,
        STEPS.c.started_at,
        STEPS.c.finished_at,
    )
    .where(STEPS.c.build_id == given(STEPS.c.build_id))
    .order_by(STEPS.c.round)
)


def list_recent_times(
    tx: Session, project_id: str, workflow_id: str, names: Collection[str]
) -> dict[str, list[StepTimes]]:
    """How the steps of these names went in the workflow's latest builds that succeeded, by name.

    Each build counts once for a step, by its latest row; of that row its last attempt.
    """
    times: dict[str, list[StepTimes]] = {}
    wanted = frozenset(names)
    for rows in _rows_of_recent_builds(tx, project_id, workflow_id):
        latest = {name: row for row in rows if (name := row.name) in wanted}
        for name, row in latest.items():
            if (went := _times_of(row)) is not None:
                times.setdefault(name, []).append(went)
    return times


def _rows_of_recent_builds(tx: Session, project_id: str, workflow_id: str) -> Iterator[list[Found]]:
    """The rows of one build after the other, newest build first, those of a step from first to last."""
    read = 0
    recent = _RECENT.all(tx, {"the_project_id": project_id, "the_workflow_id": workflow_id})
    for turn, build in enumerate(recent):
        if turn >= FEWEST_BUILDS and read >= ENOUGH_ROWS:
            return
        rows = _ROWS.all(tx, {"the_build_id": build.id})
        read += len(rows)
        yield rows


def _times_of(step: Found) -> StepTimes | None:
    """None for a step that no runner has run: who only reports its end tells no duration."""
    if step.state != StepState.SUCCEEDED or step.runner_id is None:
        return None
    claimed_at, started_at, finished_at = step.claimed_at, step.started_at, step.finished_at
    if claimed_at is None or started_at is None or finished_at is None:
        return None
    return StepTimes(
        waited=_between(may_be_taken_at(step) or claimed_at, claimed_at),
        prepared=_between(claimed_at, started_at),
        ran=_between(started_at, finished_at),
    )


def _between(begin: datetime, end: datetime) -> timedelta:
    """Never negative: a runner that comes back goes on with a claim made before the step was ready again."""
    return max(end - begin, timedelta())
