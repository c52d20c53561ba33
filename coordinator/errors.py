"""What the coordinator refuses, as one tree; `coordinator.api.problems` gives each class its status.

CoordinatorError
├── Invalid            the request itself is wrong; `details` names every fault
│   ├── NotRunnable      the step's dependencies are not met
│   └── Leased           the step belongs to a registered runner
├── Unauthenticated    no credential, or one that does not count
│   └── Revoked            a runner's that was taken back
├── Denied             the caller is known and may not
├── NotFound           no such thing, or none the caller may see
│   ├── Foreign          another tenant's: reads as if it were not there, and is written down
│   ├── BlobGone         an input is named, and its bytes are lost
│   └── Expired          it was there, and was not kept any longer
├── Conflict           the thing is not in a state for this
│   ├── AlreadyExists    its name is taken
│   ├── InUse            something still needs it
│   ├── StaleAttempt     another attempt, or nobody, now holds the step
│   │   └── ForeignLease     the attempt was never given to who speaks of it
│   ├── SessionSuperseded  a newer process of the same runner has taken over
│   ├── LogConflict      other bytes are already stored at this offset
│   ├── LogIncomplete    the completion speaks of more log than has arrived
│   └── OutputsIncomplete  the completion names blobs that have not arrived
├── LogGap             bytes before this offset are missing
├── TooLarge           over a limit
├── DigestMismatch     the bytes are not those that were announced
├── RangeNotSatisfiable  the range lies outside the thing
├── TooMany            asked too often; come back later
└── Unavailable        cannot be answered now; try again
"""

from shared.faults import Fault


class CoordinatorError(Exception):
    """Any refusal this program names. `code` is the machine's word for it."""

    code = "error"

    def __init__(self, message: str, *, details: tuple[Fault, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class Invalid(CoordinatorError):
    """The request itself is wrong."""

    code = "invalid"


class NotRunnable(Invalid):
    """The step's dependencies are not met, or its build has ended."""

    code = "not_runnable"


class Leased(Invalid):
    """A registered runner holds the step; knowing its id is not enough."""

    code = "leased"


class Unauthenticated(CoordinatorError):
    """No credential, or one that does not count."""

    code = "unauthenticated"


class Revoked(Unauthenticated):
    """Somebody has taken this runner's credential back: what it holds is wanted no more."""

    code = "revoked"


class Denied(CoordinatorError):
    """The caller is known and may not. Who that is, and in which tenant, is for the audit trail."""

    code = "denied"

    def __init__(
        self,
        message: str,
        *,
        details: tuple[Fault, ...] = (),
        actor: str = "",
        tenant_id: str | None = None,
    ) -> None:
        super().__init__(message, details=details)
        self.actor = actor
        self.tenant_id = tenant_id


class NotFound(CoordinatorError):
    """No such thing, or none the caller may see."""

    code = "not_found"


class Foreign(NotFound):
    """There is such a thing, and it belongs to another tenant: reads the same, is written down."""


class BlobGone(NotFound):
    """The bytes of an input are lost; the step that asks for them still belongs to its runner."""

    code = "blob_gone"


class Expired(NotFound):
    """It was there, and retention has deleted it."""

    code = "expired"


class Conflict(CoordinatorError):
    """The thing is not in a state for this."""

    code = "conflict"


class AlreadyExists(Conflict):
    """Its name is taken."""

    code = "already_exists"


class InUse(Conflict):
    """Something still needs it."""

    code = "in_use"


class StaleAttempt(Conflict):
    """Another attempt, or nobody, now holds the step."""

    code = "stale_attempt"


class ForeignLease(StaleAttempt):
    """The attempt was given to another runner, or under another lease: reads the same, is written down."""


class SessionSuperseded(Conflict):
    """A newer process of the same runner has taken over."""

    code = "session_superseded"


class LogConflict(Conflict):
    """Other bytes are already stored at this offset."""

    code = "log_conflict"

    def __init__(self, size: int) -> None:
        super().__init__(f"other bytes are stored; the log holds {size} bytes")
        self.size = size


class LogIncomplete(Conflict):
    """The completion speaks of another log than the one that has arrived."""

    code = "log_incomplete"

    def __init__(self, size: int) -> None:
        super().__init__(f"the log holds {size} bytes; send the rest first")
        self.size = size


class LogGap(CoordinatorError):
    """Bytes before this offset are missing."""

    code = "log_gap"

    def __init__(self, size: int) -> None:
        super().__init__(f"the log ends at {size}")
        self.size = size


class OutputsIncomplete(Conflict):
    """The completion names blobs that have not arrived."""

    code = "outputs_incomplete"


class TooLarge(CoordinatorError):
    """Over a limit, which the message names."""

    code = "too_large"

    def __init__(self, message: str, *, limit: int, size: int | None = None) -> None:
        super().__init__(message)
        self.limit = limit
        self.size = size


class DigestMismatch(CoordinatorError):
    """The bytes are not those that were announced."""

    code = "digest_mismatch"


class RangeNotSatisfiable(CoordinatorError):
    """The range lies outside the thing."""

    code = "range_not_satisfiable"

    def __init__(self, size: int) -> None:
        super().__init__(f"the whole has {size} bytes")
        self.size = size


class TooMany(CoordinatorError):
    """Asked too often; the same request is welcome later."""

    code = "too_many"

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(CoordinatorError):
    """Cannot be answered now; the same request may be sent again."""

    code = "unavailable"
