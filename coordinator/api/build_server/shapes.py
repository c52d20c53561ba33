"""What the Build Server API shows and takes: camelCase, unset fields left out."""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic.alias_generators import to_camel

from coordinator.actions.retry_build import StepsToRetry
from coordinator.actions.show_build import BuildView
from coordinator.actions.show_cancel import CancelView, StoppedStep
from coordinator.actions.show_retention import RetentionView
from coordinator.api.endpoint import AnyCaseId, Query, QueryBool, QueryInt
from coordinator.tables import AuditLog, Build, DockerImage, Project, Runner, Workflow
from shared.clock import to_wire
from shared.states import BuildState, StepState
from shared.workflow import MAX_STEPS, MAX_TIMEOUT_S, StepSpec

Moment = Annotated[
    datetime,
    PlainSerializer(to_wire, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}, mode="serialization"),
]

SHOWN_EXPIRIES = 1000

BUILD_STATUS = {
    BuildState.CREATED: "PENDING",
    BuildState.QUEUED: "PENDING",
    BuildState.RUNNING: "RUNNING",
    BuildState.CANCELLING: "RUNNING",
    BuildState.SUCCEEDED: "SUCCESS",
    BuildState.FAILED: "FAILED",
    BuildState.CANCELLED: "FAILED",
}

STEP_STATUS = {
    StepState.PENDING: "PENDING",
    StepState.READY: "PENDING",
    StepState.CLAIMED: "RUNNING",
    StepState.RUNNING: "RUNNING",
    StepState.SUCCEEDED: "SUCCESS",
    StepState.FAILED: "FAILED",
    StepState.CANCELLED: "CANCELLED",
    StepState.SKIPPED: "SKIPPED",
}


class Shape(BaseModel):
    """An answer."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True)


class Input(BaseModel):
    """A body: closed and strict."""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True, frozen=True)


class ErrorDetail(Shape):
    path: Annotated[str, Field(description="The field, such as steps[3].dependsOn[0]")]
    reason: Annotated[str, Field(description="What is wrong with it")]


class ErrorOut(Shape):
    """Every refusal of this surface."""

    error: Annotated[str, Field(description="Error message")]
    code: Annotated[str, Field(description="The machine's word for the error")]
    details: Annotated[list[ErrorDetail], Field(description="Validation error details")]
    size: Annotated[int | None, Field(description="How many bytes the log holds")] = None
    limit: Annotated[int | None, Field(description="The limit that was reached, in bytes")] = None


class RetentionOut(Shape):
    """How long and how much is kept; 0 keeps for ever."""

    log_days: Annotated[int | None, Field(description="Days until logs go")] = None
    artifact_days: Annotated[int | None, Field(description="Days until artifacts go")] = None
    build_days: Annotated[int | None, Field(description="Days until builds go")] = None
    builds: Annotated[int | None, Field(description="How many of the newest builds are kept")] = None
    megabytes: Annotated[int | None, Field(description="MiB of artifacts and logs that are kept")] = None


class ExpiryOut(Shape):
    build_id: str
    number: Annotated[int, Field(description="The build's number")]
    part: Annotated[
        str,
        Field(
            description="What goes; a build takes its artifacts and logs along",
            json_schema_extra={"enum": ["artifacts", "logs", "build"]},
        ),
    ]
    reason: Annotated[
        str,
        Field(
            description="The rule that lets it go",
            json_schema_extra={"enum": ["age", "count", "size", "project_deleted"]},
        ),
    ]
    files: Annotated[int, Field(description="How many artifacts and logs these are")]
    bytes: Annotated[int, Field(description="Their bytes; what several builds share counts for each")]


class RetentionPlanOut(Shape):
    rules: Annotated[RetentionOut, Field(description="What holds: the project's own rules over the defaults")]
    expires: Annotated[list[ExpiryOut], Field(description="The first 1000 of what goes, in this order")]
    total: Annotated[int, Field(description="How many entries there are in all")]
    bytes: Annotated[int, Field(description="The bytes of all of them")]


class ProjectOut(Shape):
    id: Annotated[str, Field(description="Unique project identifier")]
    account_id: Annotated[str, Field(description="Account that owns the project")]
    name: Annotated[str, Field(description="Project name")]
    repo_url: Annotated[str | None, Field(description="Repository of builds that name none")] = None
    default_branch: Annotated[
        str | None, Field(description="Branch of builds that name neither branch nor commit")
    ] = None
    default_workflow_id: Annotated[str | None, Field(description="Workflow of builds that name none")] = None
    retention: Annotated[
        RetentionOut | None, Field(description="Rules of its own; what is not named follows the defaults")
    ] = None
    created_at: Moment
    updated_at: Moment


class SecretOut(Shape):
    name: Annotated[str, Field(description="The name, which is also the variable that a step finds")]
    created_at: Moment
    updated_at: Annotated[Moment, Field(description="When the value was set last")]


class WorkflowOut(Shape):
    id: Annotated[str, Field(description="Unique workflow identifier")]
    project_id: Annotated[str, Field(description="Project this workflow belongs to")]
    name: Annotated[str, Field(description="Workflow name")]
    created_at: Moment
    updated_at: Moment


class WorkflowDetail(WorkflowOut):
    version: Annotated[int, Field(description="Counts the changes of the workflow from 1")]
    steps: list[StepSpec]


class BuildOut(Shape):
    id: Annotated[str, Field(description="Unique build identifier")]
    project_id: Annotated[str, Field(description="Project this build belongs to")]
    workflow_id: Annotated[str, Field(description="Workflow used for this build")]
    status: Annotated[
        str,
        Field(
            description="Current build status",
            json_schema_extra={"enum": ["PENDING", "RUNNING", "SUCCESS", "FAILED"]},
        ),
    ]
    commit_hash: Annotated[str | None, Field(description="Git commit hash")] = None
    repo_url: Annotated[str | None, Field(description="Git repository URL")] = None
    branch: Annotated[str | None, Field(description="Git branch name")] = None
    commit_message: Annotated[str | None, Field(description="Git commit message")] = None
    commit_author: Annotated[str | None, Field(description="Git commit author")] = None
    created_at: Moment
    started_at: Moment | None = None
    finished_at: Moment | None = None
    number: Annotated[int, Field(description="Counts the project's builds from 1, without gaps")]
    status_reason: Annotated[str | None, Field(description="Why the build did not succeed")] = None
    artifacts_expired_at: Annotated[
        Moment | None, Field(description="When the artifacts it had were let go")
    ] = None
    logs_expired_at: Annotated[Moment | None, Field(description="When the logs it had were let go")] = None
    timeout_seconds: Annotated[int | None, Field(description="Time limit of the whole build")] = None


class AttemptOut(Shape):
    attempt: int
    runner_id: str | None = None
    outcome: Annotated[str | None, Field(description="How the attempt ended; absent while it has not")] = None
    reason: str | None = None
    detail: str | None = None
    exit_code: int | None = None
    oom: Annotated[bool | None, Field(description="True when memory ran out in the attempt")] = None
    image_digest: str | None = None
    output_paths: Annotated[
        list[str] | None, Field(description="What a caller without a lease named as its outputs")
    ] = None
    log_size: int
    log_sha256: str | None = None
    log_state: Annotated[str, Field(json_schema_extra={"enum": ["open", "complete", "truncated", "gap"]})]
    claimed_at: Moment
    started_at: Moment | None = None
    finished_at: Moment | None = None


class StepOut(Shape):
    id: str
    name: str
    status: Annotated[
        str,
        Field(
            json_schema_extra={"enum": ["PENDING", "RUNNING", "SUCCESS", "FAILED", "CANCELLED", "SKIPPED"]}
        ),
    ]
    phase: Annotated[str | None, Field(description="How far the runner is, while the step runs")] = None
    reason: str | None = None
    exit_code: int | None = None
    attempt: int
    round: Annotated[int, Field(description="The round this row belongs to; earlier ones never change")]
    runner_id: str | None = None
    image: Annotated[str, Field(description="The image the step was made with")]
    image_digest: str | None = None
    depends_on: list[str]
    started_at: Moment | None = None
    finished_at: Moment | None = None
    log_size: int
    attempts: list[AttemptOut]


class BuildDetail(BuildOut):
    round: Annotated[int, Field(description="Counts the retries from 1; status and times are this round's")]
    steps: list[StepOut]


class Pagination(Shape):
    total: Annotated[int, Field(description="Total number of entries")]
    limit: Annotated[int, Field(description="Number of entries per page")]
    offset: Annotated[int, Field(description="Number of entries skipped")]
    has_more: Annotated[bool, Field(description="Whether there are more entries available")]


class BuildPage(Shape):
    builds: list[BuildOut]
    pagination: Pagination


class CancelOut(Shape):
    cancel_id: Annotated[str, Field(description="The receipt of this cancellation")]
    build_id: str
    status: str


class CancelStepOut(Shape):
    step_id: str
    name: str
    attempt: Annotated[int | None, Field(description="The attempt that had to stop, where there was one")] = (
        None
    )
    runner_id: str | None = None
    state: Annotated[str, Field(description="How the step stands, or how an earlier attempt of it ended")]
    requested_at: Annotated[Moment, Field(description="When it was told to stop")]
    term_at: Annotated[Moment | None, Field(description="When its processes were asked to end")] = None
    dead_at: Annotated[Moment | None, Field(description="When the last of its processes was dead")] = None
    cleaned_at: Annotated[
        Moment | None, Field(description="When its container, networks, volumes and workspace were removed")
    ] = None
    confirmed: Annotated[bool, Field(description="Whether it is certain that nothing of it is left")]
    leftovers: Annotated[list[str], Field(description="What its runner could not remove")]


class CancelDetail(Shape):
    id: str
    build_id: str
    requested_at: Moment
    state: Annotated[str, Field(json_schema_extra={"enum": ["running", "done"]})]
    confirmed: Annotated[bool, Field(description="Whether every step is confirmed")]
    steps: list[CancelStepOut]


class DockerImageOut(Shape):
    id: Annotated[str, Field(description="Unique docker image identifier")]
    slug: Annotated[str, Field(description="Unique slug for the docker image")]
    image_url: Annotated[str, Field(description="Docker image URL")]
    public: Annotated[bool, Field(description="Whether the image is publicly available")]
    created_at: Moment


class AuditLogOut(Shape):
    id: Annotated[str, Field(description="Unique audit log identifier")]
    project_id: Annotated[str | None, Field(description="Project this log entry belongs to")] = None
    action: Annotated[str, Field(description="Action that was performed")]
    details: Annotated[dict[str, Any], Field(description="Additional details about the action")]
    actor: Annotated[str, Field(description="Who did it")]
    address: Annotated[str | None, Field(description="The network address it came from")] = None
    account_id: Annotated[str | None, Field(description="The account this log entry belongs to")] = None
    seq: Annotated[int | None, Field(description="Its number in the account's chain, once it is sealed")] = (
        None
    )
    hash: Annotated[
        str | None, Field(description="SHA-256 of this entry and the hash before it, once it is sealed")
    ] = None
    created_at: Moment


class AuditPage(Shape):
    audit_logs: list[AuditLogOut]
    pagination: Pagination


class ArtifactOut(Shape):
    id: str
    step_id: str
    path: Annotated[str, Field(description="Path in the workspace")]
    size: Annotated[int, Field(description="Bytes")]
    sha256: Annotated[str, Field(description="Digest of the bytes; empty for links and directories")]
    type: Annotated[str, Field(json_schema_extra={"enum": ["file", "link", "directory"]})]
    mode: Annotated[int, Field(description="Permission bits")]
    target: Annotated[str | None, Field(description="Where a link points")] = None


class RunnerOut(Shape):
    id: str
    name: str
    account_id: Annotated[str | None, Field(description="Whose steps it takes")] = None
    is_shared: Annotated[bool, Field(description="Whether it takes the steps of every tenant")]
    labels: list[str]
    platform: str
    version: str
    slots: int
    draining: bool
    disk_free: Annotated[int, Field(description="Bytes free on the runner's disk")]
    low_disk: Annotated[
        bool, Field(description="Whether it takes no steps because too little of its disk is free")
    ]
    paused_until: Annotated[
        Moment | None, Field(description="Until when it takes no steps because its machine kept failing")
    ] = None
    pause_reason: Annotated[str, Field(description="Why it pauses; empty when it does not")] = ""
    rotate_requested_at: Annotated[
        Moment | None, Field(description="Since when it is asked to take a new secret, until it uses one")
    ] = None
    created_at: Moment
    last_seen_at: Moment | None = None


class ReceivedOut(Shape):
    received: Annotated[int, Field(description="How many bytes of the blob have arrived")]


class Health(Shape):
    status: str


class ProjectCreate(Input):
    account_id: Annotated[str, Field(min_length=1, max_length=255, description="Account identifier")]
    name: Annotated[str, Field(min_length=1, max_length=100, description="Project name")]


class RetentionIn(Input):
    """A project's own rules, all of them; what is null or absent follows the coordinator's defaults."""

    log_days: Annotated[int | None, Field(ge=0, le=36500)] = None
    artifact_days: Annotated[int | None, Field(ge=0, le=36500)] = None
    build_days: Annotated[int | None, Field(ge=0, le=36500)] = None
    builds: Annotated[int | None, Field(ge=0, le=10**9)] = None
    megabytes: Annotated[int | None, Field(ge=0, le=10**9)] = None


class ProjectPatch(Input):
    """Only what is named is changed; null clears."""

    name: Annotated[str | None, Field(min_length=1, max_length=100)] = None
    repo_url: Annotated[str | None, Field(min_length=1, max_length=2048)] = None
    default_branch: Annotated[str | None, Field(min_length=1, max_length=244)] = None
    default_workflow_id: Annotated[AnyCaseId | None, Field(min_length=1, max_length=36)] = None
    retention: RetentionIn | None = None

    def changes(self) -> dict[str, Any]:
        """The fields that are named, with their values."""
        named = {name: getattr(self, name) for name in self.model_fields_set}
        if self.retention is not None:
            named["retention"] = self.retention.model_dump(exclude_none=True)
        return named


class SecretPut(Input):
    """No refusal and no log repeats the value."""

    model_config = ConfigDict(hide_input_in_errors=True)

    value: Annotated[
        str, Field(min_length=1, max_length=65536, repr=False, description="1 to 65536 bytes of UTF-8")
    ]


class DockerImageCreate(Input):
    slug: Annotated[str, Field(min_length=1, max_length=50, description="Unique slug for the docker image")]
    image_url: Annotated[str, Field(min_length=1, max_length=1024, description="Docker image URL")]
    public: Annotated[bool, Field(description="Whether the image is publicly available")] = False


class WorkflowCreate(Input):
    """Judged as a whole by the planner, so that one answer names every fault."""

    name: Annotated[str, Field(min_length=1, max_length=100, description="Workflow name")]
    steps: Annotated[list[StepSpec], Field(min_length=1, max_length=MAX_STEPS)]


class WorkflowBody(BaseModel):
    """The outermost shape of a workflow; the planner judges the rest, and names all that is wrong at once."""

    model_config = ConfigDict(extra="allow")

    name: Any = None
    steps: Any = None

    def unknown_fields(self) -> list[str]:
        return list(self.model_extra or {})


class BuildCreate(Input):
    workflow_id: Annotated[
        AnyCaseId, Field(min_length=1, max_length=64, description="Workflow identifier to use for this build")
    ]
    commit_hash: Annotated[str | None, Field(max_length=64, description="Git commit hash")] = None
    repo_url: Annotated[str | None, Field(max_length=2048, description="Git repository URL")] = None
    branch: Annotated[str | None, Field(max_length=244, description="Git branch name")] = None
    commit_message: Annotated[str | None, Field(max_length=65536, description="Git commit message")] = None
    commit_author: Annotated[str | None, Field(max_length=1024, description="Git commit author")] = None
    timeout_seconds: Annotated[
        int | None,
        Field(ge=1, le=MAX_TIMEOUT_S, description="Time limit of the whole build, from its first claim"),
    ] = None


class BuildRetry(Input):
    steps: Annotated[
        StepsToRetry,
        Field(
            description="`failed`: those that failed, were cancelled or skipped, with all behind them; "
            "`all`: every step that has ended, but for those that a step which has not ended stands on"
        ),
    ]


class BuildQuery(Query):
    rounds: Annotated[
        Literal["latest", "all"],
        Field(description="Each step by its latest row, or the rows of every round"),
    ] = "latest"


class ByAccount(Query):
    accountId: Annotated[  # noqa: N815 - the wire's own name
        str, Field(min_length=1, max_length=255, description="Account identifier to filter projects")
    ]


class BuildPageQuery(Query):
    limit: Annotated[QueryInt, Field(ge=1, le=100, description="Maximum number of builds to return")] = 20
    offset: Annotated[QueryInt, Field(ge=0, le=2**53, description="Number of builds to skip")] = 0


class ImageQuery(Query):
    public: Annotated[QueryBool | None, Field(description="Filter to public images only")] = None


class AuditQuery(Query):
    projectId: Annotated[  # noqa: N815 - the wire's own name
        AnyCaseId | None, Field(max_length=64, description="Filter logs by project ID")
    ] = None
    action: Annotated[str | None, Field(max_length=64, description="Filter logs by action type")] = None
    limit: Annotated[QueryInt, Field(ge=1, le=1000, description="Maximum number of logs to return")] = 100
    offset: Annotated[QueryInt, Field(ge=0, le=2**53, description="Number of logs to skip")] = 0


class LogQuery(Query):
    attempt: Annotated[
        QueryInt | None, Field(ge=1, le=2**31 - 1, description="Attempt; the latest by default")
    ] = None
    follow: Annotated[QueryBool, Field(description="Stream as server-sent events until the step ends")] = (
        False
    )


class AppendQuery(Query):
    offset: Annotated[QueryInt, Field(ge=0, le=2**53, description="Where these bytes begin")]


def project_out(project: Project, account: str) -> ProjectOut:
    fields = project.model_dump(exclude={"tenant_id", "deleted_at", "last_build_number"})
    return ProjectOut(account_id=account, **fields)


def secret_out(row: Any) -> SecretOut:
    return SecretOut(name=row["name"], created_at=row["created_at"], updated_at=row["updated_at"])


def retention_out(view: RetentionView) -> RetentionPlanOut:
    return RetentionPlanOut(
        rules=RetentionOut(**asdict(view.rules)),
        expires=[
            ExpiryOut(
                build_id=one.expiry.build_id,
                number=one.expiry.number,
                part=one.expiry.part,
                reason=one.expiry.why,
                files=one.files,
                bytes=one.size,
            )
            for one in view.expires[:SHOWN_EXPIRIES]
        ],
        total=len(view.expires),
        bytes=view.size,
    )


def workflow_out(workflow: Workflow) -> WorkflowOut:
    return WorkflowOut(**workflow.model_dump(exclude={"version", "deleted_at"}))


def workflow_detail(workflow: Workflow, steps: list[dict[str, Any]]) -> WorkflowDetail:
    return WorkflowDetail(
        **workflow.model_dump(exclude={"deleted_at"}),
        steps=[StepSpec.model_validate(step, by_alias=True) for step in steps],
    )


def image_out(image: DockerImage) -> DockerImageOut:
    return DockerImageOut(**image.model_dump(exclude={"tenant_id"}))


def build_out(build: Build) -> BuildOut:
    return BuildOut(**_build_fields(build))


def _build_fields(build: Build) -> dict[str, Any]:
    return {
        "id": build.id,
        "project_id": build.project_id,
        "workflow_id": build.workflow_id,
        "status": BUILD_STATUS[BuildState(build.state)],
        "commit_hash": build.commit_hash or build.requested_commit,
        "repo_url": build.repo_url,
        "branch": build.branch,
        "commit_message": build.commit_message,
        "commit_author": build.commit_author,
        "created_at": build.created_at,
        "started_at": build.started_at,
        "finished_at": build.finished_at,
        "artifacts_expired_at": build.artifacts_expired_at,
        "logs_expired_at": build.logs_expired_at,
        "number": build.number,
        "status_reason": build.reason,
        "timeout_seconds": build.timeout_s,
    }


def build_detail(view: BuildView) -> BuildDetail:
    return BuildDetail(
        **_build_fields(view.build),
        round=view.build.round,
        steps=[_step_out(step, view.attempts.get(step.id, [])) for step in view.steps],
    )


def _step_out(step: Any, attempts: list[Any]) -> StepOut:
    return StepOut(
        id=step.id,
        name=step.name,
        status=STEP_STATUS[StepState(step.state)],
        phase=step.phase if StepState(step.state).is_leased else None,
        reason=step.reason,
        exit_code=step.exit_code,
        attempt=step.attempt,
        round=step.round,
        runner_id=step.runner_id,
        image=step.image_url,
        image_digest=step.image_digest,
        depends_on=step.spec["dependsOn"],
        started_at=step.started_at,
        finished_at=step.finished_at,
        log_size=step.log_size,
        attempts=[_attempt_out(attempt, step) for attempt in attempts],
    )


def _attempt_out(attempt: Any, step: Any) -> AttemptOut:
    is_open = attempt.attempt == step.attempt and attempt.finished_at is None
    return AttemptOut(
        attempt=attempt.attempt,
        runner_id=attempt.runner_id,
        outcome=attempt.outcome,
        reason=attempt.reason,
        detail=attempt.detail,
        exit_code=attempt.exit_code,
        oom=attempt.oom or None,
        image_digest=attempt.image_digest,
        output_paths=attempt.output_paths or None,
        log_size=step.log_size if is_open else attempt.log_size,
        log_sha256=attempt.log_sha256,
        log_state=attempt.log_state,
        claimed_at=attempt.claimed_at,
        started_at=attempt.started_at,
        finished_at=attempt.finished_at,
    )


def cancel_detail(view: CancelView) -> CancelDetail:
    return CancelDetail(
        id=view.id,
        build_id=view.build_id,
        requested_at=view.requested_at,
        state="done" if view.is_done else "running",
        confirmed=view.is_confirmed,
        steps=[_cancel_step_out(step) for step in view.steps],
    )


def _cancel_step_out(step: StoppedStep) -> CancelStepOut:
    row = step.row
    return CancelStepOut(
        step_id=row.step_id,
        name=row.name,
        attempt=row.attempt or None,
        runner_id=row.runner_id,
        state=step.state,
        requested_at=step.requested_at,
        term_at=row.term_at,
        dead_at=row.dead_at,
        cleaned_at=row.cleaned_at,
        confirmed=step.is_confirmed,
        leftovers=row.leftovers or [],
    )


def pagination(total: int, limit: int, offset: int, shown: int) -> Pagination:
    return Pagination(total=total, limit=limit, offset=offset, has_more=offset + shown < total)


def audit_out(row: AuditLog, accounts: Mapping[str, str]) -> AuditLogOut:
    return AuditLogOut(
        id=row.id,
        project_id=row.project_id,
        action=row.action,
        details=row.details,
        actor=row.actor,
        address=row.address or None,
        account_id=accounts.get(row.tenant_id, row.tenant_id) if row.tenant_id is not None else None,
        seq=row.seq,
        hash=row.hash.hex() if row.hash is not None else None,
        created_at=row.created_at,
    )


def artifact_out(row: Any) -> ArtifactOut:
    return ArtifactOut(
        id=row.id,
        step_id=row.step_id,
        path=row.path,
        size=row.size,
        sha256=row.sha256,
        type=row.type,
        mode=row.mode,
        target=row.target or None,
    )


def runner_out(runner: Runner, account: str | None) -> RunnerOut:
    fields = runner.model_dump(include=set(RunnerOut.model_fields))
    return RunnerOut(**fields, account_id=account, is_shared=runner.tenant_id is None)
