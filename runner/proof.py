"""What every write about an attempt carries."""

from dataclasses import dataclass

from shared import paths


@dataclass(frozen=True)
class Proof:
    """The attempt of a step, and the lease under which this runner has it."""

    step_id: str
    attempt: int
    lease: str

    def headers(self) -> dict[str, str]:
        return {paths.ATTEMPT_HEADER: str(self.attempt), paths.LEASE_HEADER: self.lease}
