"""What runners and the coordinator say to each other, message by message.

The runner's credential names the runner; nothing in a body does. Every write about a step carries
its attempt and lease in headers. All durations come from the coordinator, in seconds.
"""

from enum import StrEnum
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from shared.ids import canonical_id
from shared.reasons import Reason

PROTOCOL_VERSION = 1
MAX_REPORTS = 64
MAX_AGE_S = 366 * 24 * 3600
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Label = Annotated[str, Field(min_length=1, max_length=64)]
RequestId = Annotated[str, Field(min_length=8, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
StepId = Annotated[str, Field(min_length=1, max_length=64), AfterValidator(canonical_id)]
Size = Annotated[int, Field(ge=0, le=2**53)]


class Message(BaseModel):
    """Said by a runner: closed and strict."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", strict=True, frozen=True
    )


class Reply(BaseModel):
    """Said by the coordinator: a runner of an older version ignores what it does not know."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )


class Phase(StrEnum):
    """How far a runner is with an attempt."""

    PULLING = "pulling"
    CHECKOUT = "checkout"
    RESTORING = "restoring"
    RUNNING = "running"
    COLLECTING = "collecting"
    UPLOADING = "uploading"
    COMPLETING = "completing"


class Action(StrEnum):
    """What a runner is to do with an attempt."""

    CONTINUE = "continue"
    CANCEL = "cancel"
    ABANDON = "abandon"


class Registration(Message):
    """A machine asks to become a runner."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    labels: Annotated[list[Label], Field(max_length=64)] = []
    platform: Annotated[str, Field(max_length=64)] = ""
    version: Annotated[str, Field(max_length=64)] = ""


class Registered(Reply):
    """The runner's identity; the secret is shown this once."""

    runner_id: str
    runner_secret: str


class Acquire(Message):
    """A runner asks for up to `slots` steps, and may wait for the first of them.

    `only_labelled`: none of the steps that ask for no label.
    """

    request_id: RequestId
    session: RequestId
    slots: Annotated[int, Field(ge=1, le=64)] = 1
    labels: Annotated[list[Label], Field(max_length=64)] = []
    only_labelled: bool = False
    platform: Annotated[str, Field(max_length=64)] = ""
    version: Annotated[str, Field(max_length=64)] = ""
    wait: Annotated[int, Field(ge=0, le=25)] = 0
    warm: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=256)] = []
    draining: bool = False


class Mount(Reply):
    """A cache directory of the step."""

    path: str
    key: str
    trust: Literal["default", "other"] = "other"


class Source(Reply):
    """Where the workspace's files come from; `commit` empty means: the branch's head, to be resolved."""

    repo_url: str
    branch: str = ""
    commit: str = ""
    default_branch: str = ""
    is_project_repository: bool = False


class InputFile(Reply):
    """One output of a dependency that has to stand in the workspace. Later entries win over earlier."""

    step: str
    path: str
    type: Literal["file", "link", "directory"]
    mode: int = 0o644
    size: int = 0
    sha256: str = ""
    target: str = ""


class Limits(Reply):
    """Bounds of one step; durations in seconds, sizes in bytes."""

    timeout_s: int
    grace_s: int = 10
    no_output_s: int | None = None
    pull_timeout_s: int = 1800
    log_bytes: int = 256 * 1024 * 1024
    artifact_bytes: int = 8 * 1024**3
    artifact_count: int = 20_000
    cpus: float | None = None
    memory_mb: int | None = None
    pids: int | None = None


class Timings(Reply):
    """How often to speak, and what silence means; seconds."""

    heartbeat_s: float = 5.0
    claim_ttl_s: float = 20.0
    lost_after_s: float = 60.0
    amnesty_s: float = 0.0  # from the claim on: nobody counts as silent so soon after a start


class Claim(Reply):
    """One step, handed to one runner for one attempt.

    `secrets` holds the values of `secret_names`; a runner never writes them to its disk.
    """

    step_id: str
    attempt: int
    lease: str
    build_id: str
    project_id: str
    name: str
    script: str
    script_sha256: str
    image: str
    env: dict[str, str] = {}
    secret_names: list[str] = []
    secrets: Annotated[dict[str, str], Field(repr=False)] = {}
    mounts: list[Mount] = []
    output_paths: list[str] = []
    source: Source | None = None
    inputs: list[InputFile] = []
    limits: Limits
    timings: Timings = Timings()
    network: Literal["bridge", "none"] = "bridge"
    exclusive: bool = False
    user: Literal["root", "image"] = "root"


class Claims(Reply):
    claims: list[Claim]


class Start(Message):
    """The container stands and may be started."""

    container: Annotated[str, Field(max_length=256)] = ""
    node: Annotated[str, Field(max_length=256)] = ""
    image_digest: Annotated[str, Field(max_length=512)] = ""


class StartAnswer(Reply):
    action: Literal["go", "cancel"]
    timeout_s: int
    grace_s: int


class Proven(Message):
    """One attempt, and the lease under which the runner has it."""

    step_id: StepId
    attempt: Annotated[int, Field(ge=1, le=2**31 - 1)]
    lease: Annotated[str, Field(max_length=128)]


class AttemptReport(Proven):
    """What a runner holds right now."""

    phase: Phase
    log_size: Size = 0


class Heartbeat(Message):
    """The runner lives, and so do these attempts.

    `paused_for_s` above 0: it takes no steps for so many seconds, because its own machine keeps failing.
    """

    session: RequestId
    draining: bool = False
    slots: Annotated[int, Field(ge=0, le=4096)] = 0
    disk_free: Size = 0
    low_disk: bool = False
    paused_for_s: Annotated[int, Field(ge=0, le=86_400)] = 0
    pause_reason: Annotated[str, Field(max_length=200)] = ""
    attempts: Annotated[list[AttemptReport], Field(max_length=4096)] = []


class Listen(Message):
    """A runner waits to be told that one of its attempts is to stop; `since` is the last it heard of."""

    session: RequestId
    since: Annotated[str, Field(max_length=40)] = ""
    wait: Annotated[int, Field(ge=0, le=25)] = 0


class News(Reply):
    """Some attempt is to stop; the answer to the next heartbeat says which. `since` is for the next time."""

    since: str


class Resume(Message):
    """A restarted runner names what it found on its disk."""

    session: RequestId
    attempts: Annotated[list[AttemptReport], Field(max_length=4096)] = []


class Order(Reply):
    """What to do with one attempt."""

    step_id: str
    attempt: int
    action: Action
    reason: str = ""
    grace_s: int = 10
    secrets: Annotated[dict[str, str], Field(repr=False)] = {}


class Orders(Reply):
    """`rotate`: the runner is to take a new secret; said again until it uses one."""

    attempts: list[Order]
    drain: bool = False
    next: float = 5.0
    rotate: bool = False


class NewSecret(Message):
    """The secret that a runner has made for itself, by its digest alone."""

    secret_sha256: Sha256


class SourceResolved(Message):
    """The commit a branch or an abbreviated hash stands for."""

    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40}([0-9a-f]{24})?$")]


class SourceBound(Reply):
    """The commit that binds every step of the build."""

    commit: str


class LogAccepted(Reply):
    size: int
    action: Action = Action.CONTINUE


class ArtifactEntry(Message):
    """One collected output, named in the completion; the blob was uploaded before."""

    path: Annotated[str, Field(min_length=1, max_length=4096)]
    type: Literal["file", "link", "directory"]
    mode: Annotated[int, Field(ge=0, le=0o777)] = 0o644
    size: Size = 0
    sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    target: Annotated[str, Field(max_length=4096)] = ""


class Completion(Message):
    """How an attempt ended. The first three fields are the published contract's."""

    status: Annotated[Literal["success", "failed"], Field(description="Step completion status")]
    logs: Annotated[str | None, Field(description="Step execution logs")] = None
    output_paths: Annotated[
        list[str] | None, Field(description="Path to artifacts generated by this step")
    ] = None
    exit_code: Annotated[int | None, Field(ge=0, le=255)] = None
    reason: Reason | None = None
    detail: Annotated[str, Field(max_length=4096)] = ""
    signal: Annotated[int | None, Field(ge=0, le=64)] = None
    oom: bool = False
    log_size: Annotated[int | None, Field(ge=0, le=2**53)] = None
    log_sha256: Annotated[str | None, Field(pattern=r"^[0-9a-f]{64}$")] = None
    log_gap: Annotated[
        bool | None, Field(description="Bytes of the log are lost; without logSize, all behind its end")
    ] = None
    artifacts: Annotated[list[ArtifactEntry], Field(max_length=20_000)] = []
    started_at: Annotated[str | None, Field(max_length=40)] = None
    finished_at: Annotated[str | None, Field(max_length=40)] = None
    infra: bool = False


class Completed(Reply):
    success: Annotated[bool, Field(description="Whether the operation was successful")]
    step_status: Annotated[str, Field(description="Updated step status")]
    build_complete: Annotated[bool, Field(description="Whether all steps in the build are complete")]


class ReportedStart(Proven, Start):
    """A `Start`, with the proof that its own request would have in its headers."""


class ReportedCompletion(Proven, Completion):
    """A `Completion`, with the proof that its own request would have in its headers."""


R = TypeVar("R", ReportedStart, ReportedCompletion)


def _once(reports: list[R]) -> list[R]:
    if len({report.step_id for report in reports}) < len(reports):
        raise ValueError("must name each step at most once")
    return reports


class Reports(Message):
    """What a runner has to tell of several of its attempts; each counts by itself, as if it came alone."""

    starts: Annotated[list[ReportedStart], Field(max_length=MAX_REPORTS), AfterValidator(_once)] = []
    completions: Annotated[
        list[ReportedCompletion], Field(max_length=MAX_REPORTS), AfterValidator(_once)
    ] = []


class RefusedDetail(Reply):
    path: str
    reason: str


class Refused(Reply):
    """The body with which the report's own request would have been refused."""

    error: str
    code: str
    details: list[RefusedDetail] = []
    size: int | None = None
    limit: int | None = None
    retry_after: Annotated[int | None, Field(ge=0, description="Seconds, as in the header")] = None


class StartReport(Reply):
    """The status that the start's own request would have had, and what was answered."""

    status: int
    answer: StartAnswer | None = None
    refused: Refused | None = None


class CompletionReport(Reply):
    """The status that the completion's own request would have had, and what was answered."""

    status: int
    answer: Completed | None = None
    refused: Refused | None = None


class ReportAnswers(Reply):
    """One answer for each report, in their order."""

    starts: list[StartReport] = []
    completions: list[CompletionReport] = []


class Cleaned(Message):
    """A cancelled or abandoned attempt has been removed from its machine; ages in seconds before now.

    `leftovers` names what could not be removed, as engine and disk show it; empty means nothing is left.
    """

    term_age_s: Annotated[float | None, Field(ge=0, le=MAX_AGE_S)] = None
    dead_age_s: Annotated[float | None, Field(ge=0, le=MAX_AGE_S)] = None
    cleaned_age_s: Annotated[float, Field(ge=0, le=MAX_AGE_S)]
    leftovers: Annotated[list[Annotated[str, Field(max_length=512)]], Field(max_length=100)] = []


class Release(Message):
    """The step goes back: none of its script ran here."""

    reason: Annotated[str, Field(max_length=200)] = ""


class Ok(Reply):
    ok: bool = True
