"""What follows from the states of steps: who may start, who never will, and how the build stands."""

from collections.abc import Iterable, Mapping

from shared.states import BuildState, StepState


def state_after(dependencies: Iterable[StepState]) -> StepState:
    """The state of a waiting step whose dependencies stand so: READY, SKIPPED or still PENDING."""
    is_waiting = False
    for state in dependencies:
        if state.is_final and state is not StepState.SUCCEEDED:
            return StepState.SKIPPED
        if state is not StepState.SUCCEEDED:
            is_waiting = True
    return StepState.PENDING if is_waiting else StepState.READY


def build_outcome(counts: Mapping[StepState, int], *, is_cancelled: bool) -> BuildState | None:
    """How a build with so many steps in each state ended, or None while it has not."""
    if any(count for state, count in counts.items() if not state.is_final):
        return None
    if is_cancelled:
        return BuildState.CANCELLED
    if counts.get(StepState.FAILED) or counts.get(StepState.SKIPPED) or counts.get(StepState.CANCELLED):
        return BuildState.FAILED
    return BuildState.SUCCEEDED
