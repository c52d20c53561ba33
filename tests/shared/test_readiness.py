"""What follows from the states of steps."""

from itertools import combinations_with_replacement

import pytest

from shared.readiness import build_outcome, state_after
from shared.states import FINAL_STEP_STATES, BuildState, StepState

S = StepState


@pytest.mark.parametrize(
    ("dependencies", "state"),
    [
        ([], S.READY),
        ([S.SUCCEEDED], S.READY),
        ([S.SUCCEEDED, S.SUCCEEDED], S.READY),
        ([S.SUCCEEDED, S.RUNNING], S.PENDING),
        ([S.READY], S.PENDING),
        ([S.CLAIMED], S.PENDING),
        ([S.PENDING], S.PENDING),
        ([S.FAILED], S.SKIPPED),
        ([S.SKIPPED], S.SKIPPED),
        ([S.CANCELLED], S.SKIPPED),
        ([S.RUNNING, S.FAILED], S.SKIPPED),
        ([S.SUCCEEDED, S.FAILED], S.SKIPPED),
    ],
)
def test_a_step_follows_those_it_depends_on(dependencies: list[StepState], state: StepState) -> None:
    assert state_after(dependencies) is state
    assert state_after(dependencies[::-1]) is state


def test_a_step_is_ready_exactly_when_all_before_it_have_succeeded() -> None:
    for dependencies in combinations_with_replacement(StepState, 3):
        is_ready = set(dependencies) == {S.SUCCEEDED}
        assert (state_after(dependencies) is S.READY) is is_ready


def test_a_build_ends_exactly_when_all_its_steps_have() -> None:
    for states in combinations_with_replacement(StepState, 3):
        counts = {state: states.count(state) for state in set(states)}
        has_ended = set(states) <= FINAL_STEP_STATES
        for is_cancelled in (False, True):
            assert (build_outcome(counts, is_cancelled=is_cancelled) is not None) is has_ended


@pytest.mark.parametrize(
    ("states", "outcome"),
    [
        ({S.SUCCEEDED: 3}, BuildState.SUCCEEDED),
        ({S.SUCCEEDED: 2, S.FAILED: 1}, BuildState.FAILED),
        ({S.SUCCEEDED: 1, S.SKIPPED: 1}, BuildState.FAILED),
        ({S.CANCELLED: 1}, BuildState.FAILED),
        ({S.SUCCEEDED: 1, S.RUNNING: 0}, None),
    ],
)
def test_the_outcome_of_a_build_is_that_of_its_steps(
    states: dict[StepState, int], outcome: BuildState | None
) -> None:
    present = {state: count for state, count in states.items() if count}

    assert build_outcome(present, is_cancelled=False) is (outcome or BuildState.SUCCEEDED)


def test_a_build_that_was_to_be_cancelled_ends_cancelled_whatever_its_steps_did() -> None:
    assert build_outcome({S.SUCCEEDED: 1}, is_cancelled=True) is BuildState.CANCELLED
    assert build_outcome({S.FAILED: 1, S.CANCELLED: 1}, is_cancelled=True) is BuildState.CANCELLED
