"""A build as it was read back after a fault: all that the checker looks at."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class SeenAttempt:
    """One attempt with the bytes of its log."""

    number: int
    outcome: str
    reason: str
    log: bytes
    log_size: int
    log_sha256: str
    log_state: str


@dataclass(frozen=True)
class SeenArtifact:
    """One output with its bytes."""

    path: str
    sha256: str
    data: bytes


@dataclass(frozen=True)
class SeenStep:
    """One step; `events` are the audit trail's words of it, oldest first, with the attempt of each."""

    name: str
    status: str
    reason: str
    depends_on: tuple[str, ...]
    started_at: str
    finished_at: str
    attempts: tuple[SeenAttempt, ...]
    artifacts: tuple[SeenArtifact, ...]
    events: tuple[tuple[str, int], ...] = field(default=())


@dataclass(frozen=True)
class History:
    """One build."""

    build_id: str
    status: str
    steps: tuple[SeenStep, ...]
