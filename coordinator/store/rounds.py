"""The rounds of a build: which of its rows count now, and what is carried into the next round."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import delete, exists, func, insert, select, update
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.store.statements import given
from coordinator.tables import Artifact, Step, StepDependency, table_of
from shared.states import FINAL_STEP_STATES, StepState

STEPS = table_of(Step)
DEPENDENCIES = table_of(StepDependency)
ARTIFACTS = table_of(Artifact)
_NEWER = STEPS.alias("newer")

IS_LATEST = ~exists().where(
    _NEWER.c.build_id == STEPS.c.build_id, _NEWER.c.name == STEPS.c.name, _NEWER.c.round > STEPS.c.round
)
_OF_BUILD = STEPS.c.build_id == given(STEPS.c.build_id)
_LIST_ALL = select(STEPS).where(_OF_BUILD).order_by(STEPS.c.position, STEPS.c.round)
_COUNT_ROWS = select(func.count()).where(_OF_BUILD)
_COUNT_LATEST = select(STEPS.c.state, func.count()).where(_OF_BUILD, IS_LATEST).group_by(STEPS.c.state)
_ARROWS = (
    select(DEPENDENCIES.c.step_id, DEPENDENCIES.c.depends_on_id)
    .join(STEPS, STEPS.c.id == DEPENDENCIES.c.step_id)
    .where(DEPENDENCIES.c.build_id == given(DEPENDENCIES.c.build_id), IS_LATEST)
)
_DROP_ARROW = delete(DEPENDENCIES).where(
    DEPENDENCIES.c.step_id == given(DEPENDENCIES.c.step_id),
    DEPENDENCIES.c.depends_on_id == given(DEPENDENCIES.c.depends_on_id),
)
_ARTIFACTS = (
    select(ARTIFACTS)
    .join(STEPS, STEPS.c.id == ARTIFACTS.c.step_id)
    .where(
        ARTIFACTS.c.build_id == given(ARTIFACTS.c.build_id), STEPS.c.round > given(STEPS.c.round), IS_LATEST
    )
    .order_by(ARTIFACTS.c.step_id, ARTIFACTS.c.path)
)


def list_all_steps(tx: Session, build_id: str) -> list[Row[Any]]:
    """The rows of every round in the workflow's order, those of one step from first to last."""
    return list(tx.connection().execute(_LIST_ALL, {"the_build_id": build_id}).all())


def count_rows(tx: Session, build_id: str) -> int:
    """How many rows of steps the build has over all its rounds."""
    return int(tx.connection().execute(_COUNT_ROWS, {"the_build_id": build_id}).scalar_one())


def count_latest_states(tx: Session, build_id: str) -> dict[StepState, int]:
    """How many steps stand where, each counted once, by its latest row."""
    counted = tx.connection().execute(_COUNT_LATEST, {"the_build_id": build_id})
    return {StepState(state): count for state, count in counted}


def list_latest_dependencies(tx: Session, build_id: str) -> dict[str, list[str]]:
    """The arrows from the latest row of each step: they lead to latest rows alone."""
    arrows: dict[str, list[str]] = {}
    for step_id, depends_on_id in tx.connection().execute(_ARROWS, {"the_build_id": build_id}):
        arrows.setdefault(step_id, []).append(depends_on_id)
    return arrows


def list_latest_artifacts(tx: Session, build_id: str, *, after_round: int) -> list[Row[Any]]:
    """What the latest row of each step has handed on, of rounds later than this one.

    What it replaced can only be had by its id.
    """
    wanted = {"the_build_id": build_id, "the_round": after_round}
    return list(tx.connection().execute(_ARTIFACTS, wanted).all())


def carry_steps(tx: Session, build_id: str, *, round_number: int) -> list[Row[Any]]:
    """Let every step that has not ended count for this round; their ids and attempts as they are then.

    Waits for a claim that is being made of one of them, so that it is told as claimed.
    """
    statement = (
        update(STEPS)
        .where(STEPS.c.build_id == build_id, STEPS.c.state.not_in(FINAL_STEP_STATES))
        .values(round=round_number)
        .returning(STEPS.c.id, STEPS.c.attempt)
    )
    return list(tx.connection().execute(statement).all())


def turn_arrows(
    tx: Session, build_id: str, arrows: Mapping[str, Sequence[str]], fresh: Mapping[str, str]
) -> None:
    """Let these steps wait for the new rows instead of those that were replaced; `fresh` has old and new."""
    turned = [(step_id, old) for step_id, behind in arrows.items() for old in behind if old in fresh]
    if not turned:
        return
    connection = tx.connection()
    connection.execute(_DROP_ARROW, [{"the_step_id": one, "the_depends_on_id": old} for one, old in turned])
    connection.execute(
        insert(DEPENDENCIES),
        [{"step_id": one, "depends_on_id": fresh[old], "build_id": build_id} for one, old in turned],
    )
