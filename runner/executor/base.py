"""What every executor can do with one attempt of a step.

The attempt's folder is made by the caller before `create`; it holds `script.sh` and, from then on,
`launch.sh`, `log`, `rc` and `pipe`, which the executor makes. Secrets never lie in that folder.
All operations name the attempt, so a restarted runner can go on with what its predecessor left.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from runner.spares import Spare
from shared.reasons import Reason


@dataclass(frozen=True)
class Bind:
    """A folder of the host that the step sees at `target`."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Job:
    """Everything an executor has to know of one attempt."""

    runner: str
    step_id: str
    attempt: int
    build_id: str
    image: str
    attempt_dir: Path
    workspace: Path
    binds: tuple[Bind, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    network: str = "bridge"
    user: str = "root"
    cpus: float | None = None
    memory_mb: int | None = None
    pids: int | None = None

    @property
    def name(self) -> str:
        """The deterministic name of what the executor makes for this attempt."""
        return name_of(self.runner, self.step_id, self.attempt)


def name_of(runner: str, step_id: str, attempt: int) -> str:
    return f"buildmill-{runner[-8:]}-{step_id}-{attempt}"


@dataclass(frozen=True)
class Ended:
    """How the attempt's processes ended: all of them are dead when this exists.

    `rc` is what the script's launcher recorded, `code` what the engine says; success needs both to be 0.
    `reason` is set where the executor knows the cause better than the codes tell it.
    """

    rc: int | None
    code: int | None
    oom: bool = False
    reason: Reason | None = None
    detail: str = ""

    @property
    def succeeded(self) -> bool:
        return self.rc == 0 and self.code == 0 and self.reason is None


@dataclass(frozen=True)
class Created:
    """What `create` made: the engine's id of it and the digest of the image it came from."""

    container: str
    image_digest: str


@dataclass(frozen=True)
class Leftover:
    """Something of ours that is still there, found by its labels."""

    name: str
    step_id: str
    attempt: int
    is_running: bool


class Executor(Protocol):
    """Raises StepError for what the user must know, EngineUnavailable when the engine is away."""

    name: str
    isolates: bool

    def pull(self, image: str, *, deadline_s: float, progress: Callable[[str], None]) -> str:
        """Make the image present and return its digest or id; `progress` gets lines for the step's log."""

    def make_files(self, attempt_dir: Path) -> None:
        """Make log, rc and pipe, so that the log can be written before anything runs; harmless twice."""

    def create(self, job: Job) -> Created:
        """Make everything ready to start; a second call for the same attempt adopts what stands."""

    def start(self, job: Job) -> None:
        """Let the script run; a second call is harmless."""

    def has_started(self, job: Job) -> bool:
        """Whether the script was ever let run, here or by a former life."""

    def wait(self, job: Job, *, timeout_s: float) -> Ended | None:
        """Wait until every process of the attempt is dead, or return None after `timeout_s`."""

    def kill(self, job: Job, *, hard: bool) -> None:
        """Send TERM (or KILL when `hard`) to all processes; harmless when there are none."""

    def diagnostics(self, job: Job) -> bytes:
        """What the launcher itself printed, where it could not write into the step's log."""

    def destroy(self, job: Job) -> None:
        """Remove all that `create` made except the attempt's folder; harmless when it has gone."""

    def remains(self, job: Job) -> list[str]:
        """What still stands of the attempt after `destroy`, by kind and name, looked for anew.

        The attempt's folder has to be there as `destroy` left it.
        """

    def leftovers(self) -> list[Leftover]:
        """Everything this runner ever made that still stands."""

    def remove_leftover(self, leftover: Leftover) -> None:
        """Kill and remove it."""

    def remove_strays(self, held: Collection[tuple[str, int]]) -> None:
        """Remove what else was made for attempts not among these: secrets, volumes, networks."""

    def spares(self, wanted: Collection[str]) -> Iterator[Spare]:
        """Images that may go for want of room: pulled by us, used by nothing and not among these."""

    def storage(self) -> Path | None:
        """The folder of this machine on whose disk the images lie; None where there is none."""

    def close(self) -> None:
        """Give back what is kept ahead of need; attempts that run go on."""
