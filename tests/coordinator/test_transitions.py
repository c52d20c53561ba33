"""The state machine: every event from every state moves as the table says, or not at all."""

import pytest
from sqlalchemy import update

from coordinator.rules.transitions import (
    BUILD_EVENT_OF_OUTCOME,
    BUILD_TRANSITIONS,
    STEP_TRANSITIONS,
    BuildEvent,
    StepEvent,
)
from coordinator.store import builds, steps
from coordinator.tables import Build, Step, table_of
from shared.states import FINAL_BUILD_STATES, FINAL_STEP_STATES, BuildState, StepState
from tests.factories import Mill

STEPS = table_of(Step)
BUILDS = table_of(Build)


def test_every_event_moves_a_step_from_its_sources_to_its_target_and_from_nowhere_else(mill: Mill) -> None:
    step_id = mill.a_build().steps["test"]

    def moves(event: StepEvent, state: StepState) -> tuple[bool, str]:
        def action(tx: object) -> tuple[bool, str]:
            tx.connection().execute(update(STEPS).where(STEPS.c.id == step_id).values(state=state))  # type: ignore[attr-defined]
            moved = steps.move_step(tx, step_id, event)  # type: ignore[arg-type]
            return moved, steps.get_step(tx, step_id).state  # type: ignore[arg-type]

        return mill.tx(action)

    for event in StepEvent:
        sources, target = STEP_TRANSITIONS[event]
        for state in StepState:
            expected = (True, target) if state in sources else (False, state)
            assert moves(event, state) == expected, f"{event} from {state}"


def test_every_event_moves_a_build_from_its_sources_to_its_target_and_from_nowhere_else(mill: Mill) -> None:
    build_id = mill.a_build().id

    def moves(event: BuildEvent, state: BuildState) -> tuple[bool, str]:
        def action(tx: object) -> tuple[bool, str]:
            tx.connection().execute(update(BUILDS).where(BUILDS.c.id == build_id).values(state=state))  # type: ignore[attr-defined]
            moved = builds.move_build(tx, build_id, event, now=mill.clock())  # type: ignore[arg-type]
            return moved, builds.lock_build(tx, build_id).state  # type: ignore[arg-type]

        return mill.tx(action)

    for event in BuildEvent:
        sources, target = BUILD_TRANSITIONS[event]
        for state in BuildState:
            expected = (True, target) if state in sources else (False, state)
            assert moves(event, state) == expected, f"{event} from {state}"


def test_a_move_under_another_attempt_changes_nothing(mill: Mill) -> None:
    held = mill.an_acquired_step()

    assert not mill.tx(steps.move_step, held.step_id, StepEvent.START, attempt=2)

    assert mill.step(held.step_id).state == "claimed"


def test_several_steps_move_only_where_they_may(mill: Mill) -> None:
    build = mill.a_build()
    ready = build.steps["test"]
    claimed = mill.an_acquired_step().step_id

    moved = mill.tx(steps.move_steps, [ready, claimed], StepEvent.REQUEUE)

    assert moved in ([ready], [claimed])
    assert mill.tx(steps.move_steps, [], StepEvent.REQUEUE) == []


def test_nothing_leaves_a_final_state_but_a_build_that_is_retried() -> None:
    for sources, _ in STEP_TRANSITIONS.values():
        assert not sources & FINAL_STEP_STATES
    for event, (build_sources, _) in BUILD_TRANSITIONS.items():
        assert not build_sources & FINAL_BUILD_STATES or event is BuildEvent.RETRY


def test_every_state_can_be_reached_and_every_other_one_left() -> None:
    step_targets = {target for _, target in STEP_TRANSITIONS.values()} | {StepState.PENDING}
    step_sources = {state for sources, _ in STEP_TRANSITIONS.values() for state in sources}
    assert step_targets == set(StepState)
    assert step_sources == set(StepState) - FINAL_STEP_STATES

    build_targets = {target for _, target in BUILD_TRANSITIONS.values()} | {BuildState.CREATED}
    build_sources = {state for sources, _ in BUILD_TRANSITIONS.values() for state in sources}
    assert build_targets == set(BuildState)
    assert build_sources == set(BuildState)


@pytest.mark.parametrize("outcome", sorted(FINAL_BUILD_STATES))
def test_every_outcome_of_a_build_has_an_event_that_leads_there(outcome: BuildState) -> None:
    assert BUILD_TRANSITIONS[BUILD_EVENT_OF_OUTCOME[outcome]][1] is outcome
