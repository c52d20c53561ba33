"""The states of builds and steps, and which of them are final."""

from enum import StrEnum


class BuildState(StrEnum):
    """Where a build stands; every API surface maps these to its own words."""

    CREATED = "created"
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in FINAL_BUILD_STATES


class StepState(StrEnum):
    """Where a step stands."""

    PENDING = "pending"
    READY = "ready"
    CLAIMED = "claimed"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"

    @property
    def is_final(self) -> bool:
        return self in FINAL_STEP_STATES

    @property
    def is_leased(self) -> bool:
        return self in LEASED_STEP_STATES


FINAL_BUILD_STATES = frozenset({BuildState.SUCCEEDED, BuildState.FAILED, BuildState.CANCELLED})
FINAL_STEP_STATES = frozenset(
    {StepState.SUCCEEDED, StepState.FAILED, StepState.CANCELLED, StepState.SKIPPED},
)
LEASED_STEP_STATES = frozenset({StepState.CLAIMED, StepState.RUNNING})
