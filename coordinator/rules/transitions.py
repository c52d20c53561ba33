"""The state machine of steps and builds: which event is allowed from where, and where it leads.

An event has one target, so a call site cannot invent a state. `docs/states.md` is checked against this.
"""

from enum import StrEnum

from shared.states import BuildState, StepState


class StepEvent(StrEnum):
    """What can happen to a step."""

    UNBLOCK = "unblock"
    CLAIM = "claim"
    START = "start"
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    SKIP = "skip"
    REQUEUE = "requeue"
    REVIVE = "revive"


class BuildEvent(StrEnum):
    """What can happen to a build."""

    QUEUE = "queue"
    BEGIN = "begin"
    REQUEST_CANCEL = "request_cancel"
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    RETRY = "retry"


S = StepState
B = BuildState

STEP_TRANSITIONS: dict[StepEvent, tuple[frozenset[StepState], StepState]] = {
    StepEvent.UNBLOCK: (frozenset({S.PENDING}), S.READY),
    StepEvent.CLAIM: (frozenset({S.READY}), S.CLAIMED),
    StepEvent.START: (frozenset({S.CLAIMED}), S.RUNNING),
    StepEvent.SUCCEED: (frozenset({S.RUNNING}), S.SUCCEEDED),
    StepEvent.FAIL: (frozenset({S.READY, S.CLAIMED, S.RUNNING}), S.FAILED),
    StepEvent.CANCEL: (frozenset({S.PENDING, S.READY, S.CLAIMED, S.RUNNING}), S.CANCELLED),
    StepEvent.SKIP: (frozenset({S.PENDING, S.READY}), S.SKIPPED),
    StepEvent.REQUEUE: (frozenset({S.CLAIMED, S.RUNNING}), S.READY),
    StepEvent.REVIVE: (frozenset({S.READY}), S.RUNNING),
}

BUILD_TRANSITIONS: dict[BuildEvent, tuple[frozenset[BuildState], BuildState]] = {
    BuildEvent.QUEUE: (frozenset({B.CREATED}), B.QUEUED),
    BuildEvent.BEGIN: (frozenset({B.QUEUED}), B.RUNNING),
    BuildEvent.REQUEST_CANCEL: (frozenset({B.CREATED, B.QUEUED, B.RUNNING}), B.CANCELLING),
    BuildEvent.SUCCEED: (frozenset({B.QUEUED, B.RUNNING}), B.SUCCEEDED),
    BuildEvent.FAIL: (frozenset({B.QUEUED, B.RUNNING}), B.FAILED),
    BuildEvent.CANCEL: (frozenset({B.QUEUED, B.RUNNING, B.CANCELLING}), B.CANCELLED),
    BuildEvent.RETRY: (frozenset({B.QUEUED, B.RUNNING, B.SUCCEEDED, B.FAILED, B.CANCELLED}), B.QUEUED),
}

BUILD_EVENT_OF_OUTCOME = {
    B.SUCCEEDED: BuildEvent.SUCCEED,
    B.FAILED: BuildEvent.FAIL,
    B.CANCELLED: BuildEvent.CANCEL,
}
