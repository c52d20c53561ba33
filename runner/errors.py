"""What can go wrong in a runner, as one tree.

RunnerError
├── Unreachable      the coordinator cannot be reached now; try again
│   └── Unauthorized   it answers, and does not know our credential; an operator can mend that
│       └── Revoked      an operator has taken it back: nothing here is wanted any more
├── LeaseLost        this attempt is no longer ours; stop and forget it
├── Refused          the coordinator refuses this request for good
├── LogRewind        the coordinator holds another length of the log
├── LogLimit         the coordinator takes no more of the log
├── EngineUnavailable  the container engine does not answer
├── BadSetup         this machine or its settings cannot do what was asked; the message says the remedy
└── StepError        the step ends here, with a reason the user can read
    └── ImageGone      the image was here and is not any more; it can be pulled again
"""

from collections.abc import Callable

from shared.reasons import Reason


class RunnerError(Exception):
    """Any failure this program names."""


class Unreachable(RunnerError):
    """The coordinator gave no usable answer; the same request may be sent again.

    `is_back` tells, where it is known, that the coordinator had been away and has answered since.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_after_s: float | None = None,
        is_back: Callable[[], bool] | None = None,
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.is_back = is_back


class Unauthorized(Unreachable):
    """The coordinator does not accept the credential, or not any more; work is kept until it does.

    `is_unknown` when it says that it knows nobody of that credential.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None, is_unknown: bool = False) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.is_unknown = is_unknown


class Revoked(Unauthorized):
    """The coordinator says in so many words that this runner was revoked."""


class LeaseLost(RunnerError):
    """Another attempt, or nobody, now holds this step."""


class Refused(RunnerError):
    """The coordinator refuses this request; repeating it cannot help."""

    def __init__(self, message: str, *, status: int, code: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class LogRewind(RunnerError):
    """The coordinator's log ends elsewhere; go on from `size`."""

    def __init__(self, size: int) -> None:
        super().__init__(f"the coordinator holds {size} bytes of this log")
        self.size = size


class LogLimit(RunnerError):
    """The log has reached its limit; what follows is not kept."""

    def __init__(self, limit: int, size: int) -> None:
        super().__init__(f"the log limit of {limit} bytes is reached")
        self.limit = limit
        self.size = size


class EngineUnavailable(RunnerError):
    """The container engine does not answer."""


class StillAlive(EngineUnavailable):
    """The engine is away, and what it runs for us is seen to live on."""


class BadSetup(RunnerError):
    """This machine or its settings cannot do what was asked."""


class StepError(RunnerError):
    """The step cannot go on; `reason` goes into its record, `detail` into its log."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class ImageGone(StepError):
    """Somebody removed the image since it was pulled: no fault of the user's."""

    def __init__(self, image: str) -> None:
        super().__init__(Reason.DAEMON_ERROR, f"{image} was removed from this machine meanwhile")
