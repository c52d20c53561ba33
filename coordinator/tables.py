"""The rows: every table of the database, as SQLModel classes. Ids are made by us."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
    text,
)
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

from shared.states import BuildState, StepState

NAMING = {
    "ix": "ix_%(column_0_label)s",
    "uq": "uq_%(table_name)s_%(column_0_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware moment in UTC on both databases; SQLite has no time zones of its own."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Row(SQLModel):
    """All tables share one metadata with fixed constraint names, as migrations need."""

    metadata = MetaData(naming_convention=NAMING)


def table_of(row: type[SQLModel]) -> Table:
    """The plain table behind a row class, for the statements that must be fast."""
    table: Table = row.__table__  # type: ignore[attr-defined]
    return table


def moment(*, nullable: bool = True, index: bool = False) -> Any:
    return Field(default=None, sa_column=Column(UtcDateTime, nullable=nullable, index=index))


def own_id() -> Any:
    return Field(sa_column=Column(String(36), primary_key=True))


def reference(table: str, *, index: bool = True, nullable: bool = False) -> Any:
    column = Column(String(36), ForeignKey(f"{table}.id"), nullable=nullable, index=index)
    return Field(default=None, sa_column=column) if nullable else Field(sa_column=column)


def long_text(*, nullable: bool = True) -> Any:
    return Field(default=None if nullable else "", sa_column=Column(Text, nullable=nullable))


def json_field(default: Any = None) -> Any:
    return Field(default_factory=default or dict, sa_column=Column(JSON, nullable=False))


def only_where(condition: str) -> dict[str, Any]:
    """An index of the few rows of which this is true costs the others nothing."""
    return {"sqlite_where": text(condition), "postgresql_where": text(condition)}


class Tenant(Row, table=True):
    """Whose projects these are; `account` is the `accountId` of the Build Server API."""

    __tablename__ = "tenants"
    id: str = own_id()
    account: str = Field(sa_column=Column(String(255), unique=True, nullable=False))
    created_at: datetime = moment(nullable=False)


class Project(Row, table=True):
    """A named place for workflows and builds."""

    __tablename__ = "projects"
    id: str = own_id()
    tenant_id: str = reference("tenants")
    name: str = Field(sa_column=Column(String(100), nullable=False))
    repo_url: str | None = long_text()
    default_branch: str | None = long_text()
    default_workflow_id: str | None = Field(default=None, sa_column=Column(String(36)))
    last_build_number: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    retention: dict[str, int] | None = Field(
        default=None, sa_column=Column(JSON(none_as_null=True), nullable=True)
    )
    created_at: datetime = moment(nullable=False)
    updated_at: datetime = moment(nullable=False)
    deleted_at: datetime | None = moment()


class DockerImage(Row, table=True):
    """A slug that workflows use for a container image."""

    __tablename__ = "docker_images"
    __table_args__ = (UniqueConstraint("tenant_id", "slug"),)
    id: str = own_id()
    tenant_id: str = reference("tenants")
    slug: str = Field(sa_column=Column(String(50), nullable=False, index=True))
    image_url: str = long_text(nullable=False)
    public: bool = Field(default=False, nullable=False)
    created_at: datetime = moment(nullable=False)


class ProjectSecret(Row, table=True):
    """A sealed value; one row of each name is current, retired ones wait for those who still need them."""

    __tablename__ = "project_secrets"
    __table_args__ = (
        Index("ix_project_secrets_name", "project_id", "name"),
        Index("ix_project_secrets_retired", "retired_at"),
    )
    id: str = own_id()
    project_id: str = reference("projects", index=False)
    name: str = Field(sa_column=Column(String(64), nullable=False))
    key_id: str = Field(sa_column=Column(String(16), nullable=False))
    sealed: bytes = Field(sa_column=Column(LargeBinary, nullable=False))
    created_at: datetime = moment(nullable=False)
    updated_at: datetime = moment(nullable=False)
    retired_at: datetime | None = moment()


class Workflow(Row, table=True):
    """A named list of steps; each change makes a new version."""

    __tablename__ = "workflows"
    id: str = own_id()
    project_id: str = reference("projects")
    name: str = Field(sa_column=Column(String(100), nullable=False))
    version: int = Field(default=1, sa_column=Column(Integer, nullable=False))
    created_at: datetime = moment(nullable=False)
    updated_at: datetime = moment(nullable=False)
    deleted_at: datetime | None = moment()


class WorkflowVersion(Row, table=True):
    """The steps of one version, as they were written; never changed."""

    __tablename__ = "workflow_versions"
    workflow_id: str = Field(sa_column=Column(String(36), ForeignKey("workflows.id"), primary_key=True))
    version: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    steps: list[dict[str, Any]] = json_field(list)
    created_at: datetime = moment(nullable=False)


class WorkflowImage(Row, table=True):
    """Which images the current version of a workflow uses, so that none is deleted below it."""

    __tablename__ = "workflow_images"
    workflow_id: str = Field(sa_column=Column(String(36), ForeignKey("workflows.id"), primary_key=True))
    image_id: str = Field(
        sa_column=Column(String(36), ForeignKey("docker_images.id"), primary_key=True, index=True)
    )


class Build(Row, table=True):
    """One run of a workflow, with everything it needs copied in."""

    __tablename__ = "builds"
    __table_args__ = (
        UniqueConstraint("project_id", "number"),
        Index("ix_builds_unfinished", "state", "id"),
    )
    id: str = own_id()
    project_id: str = reference("projects")
    workflow_id: str = reference("workflows")
    workflow_version: int = Field(sa_column=Column(Integer, nullable=False))
    number: int = Field(sa_column=Column(Integer, nullable=False))
    round: int = Field(default=1, sa_column=Column(Integer, nullable=False))
    state: str = Field(default=BuildState.QUEUED, sa_column=Column(String(12), nullable=False))
    reason: str | None = Field(default=None, sa_column=Column(String(32)))
    repo_url: str | None = long_text()
    branch: str | None = long_text()
    requested_commit: str | None = Field(default=None, sa_column=Column(String(64)))
    commit_hash: str | None = Field(default=None, sa_column=Column(String(64)))
    commit_message: str | None = long_text()
    commit_author: str | None = long_text()
    is_project_repository: bool = Field(default=False, nullable=False)
    default_branch: str | None = long_text()
    retry_of: str | None = Field(default=None, sa_column=Column(String(36)))
    cancel_id: str | None = Field(default=None, sa_column=Column(String(36)))
    cancel_requested_at: datetime | None = moment()
    timeout_s: int | None = Field(default=None, sa_column=Column(Integer))
    deadline_at: datetime | None = moment()
    created_at: datetime = moment(nullable=False)
    updated_at: datetime | None = moment()
    started_at: datetime | None = moment()
    finished_at: datetime | None = moment()
    artifacts_expired_at: datetime | None = moment()
    artifacts_expired_round: int = Field(
        default=0, sa_column=Column(Integer, nullable=False, server_default="0")
    )
    logs_expired_at: datetime | None = moment()
    logs_expired_round: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    expired_at: datetime | None = moment()


class Step(Row, table=True):
    """One step of a build and its current attempt."""

    __tablename__ = "steps"
    __table_args__ = (
        UniqueConstraint("build_id", "name", "round"),
        Index("ix_steps_queue", "state", "ready_at", "id"),
        Index(
            "ix_steps_queue_tenant", "tenant_id", "state", "ready_at", "id", **only_where("state = 'ready'")
        ),
        Index("ix_steps_runner", "runner_id", "state"),
        Index("ix_steps_queue_limit", "queue_limit_s", **only_where("queue_limit_s IS NOT NULL")),
    )
    id: str = own_id()
    build_id: str = reference("builds")
    project_id: str = Field(sa_column=Column(String(36), nullable=False))
    tenant_id: str | None = Field(default=None, sa_column=Column(String(36)))
    name: str = Field(sa_column=Column(String(100), nullable=False))
    round: int = Field(default=1, sa_column=Column(Integer, nullable=False))
    position: int = Field(sa_column=Column(Integer, nullable=False))
    rank: int = Field(sa_column=Column(Integer, nullable=False))
    state: str = Field(default=StepState.PENDING, sa_column=Column(String(12), nullable=False))
    spec: dict[str, Any] = json_field()
    image_url: str = long_text(nullable=False)
    label_count: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    dependency_count: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    exclusive: bool = Field(default=False, nullable=False)
    attempt: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    runner_id: str | None = Field(default=None, sa_column=Column(String(36)))
    request_id: str | None = Field(default=None, sa_column=Column(String(64)))
    phase: str | None = Field(default=None, sa_column=Column(String(16)))
    infra_retries: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    user_retries: int = Field(default=0, sa_column=Column(Integer, nullable=False, server_default="0"))
    queue_limit_s: int | None = Field(default=None, sa_column=Column(Integer))
    ready_at: datetime | None = moment()
    not_before: datetime | None = moment()
    claimed_at: datetime | None = moment()
    acked_at: datetime | None = moment()
    last_seen_at: datetime | None = moment()
    started_at: datetime | None = moment()
    deadline_at: datetime | None = moment()
    finished_at: datetime | None = moment()
    cancel_requested_at: datetime | None = moment()
    cancel_force_at: datetime | None = moment()
    cancel_reason: str | None = Field(default=None, sa_column=Column(String(32)))
    reason: str | None = Field(default=None, sa_column=Column(String(32)))
    exit_code: int | None = Field(default=None, sa_column=Column(Integer))
    image_digest: str | None = long_text()
    log_size: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))


class StepLabel(Row, table=True):
    """A label that the runner of this step must have."""

    __tablename__ = "step_labels"
    step_id: str = Field(sa_column=Column(String(36), ForeignKey("steps.id"), primary_key=True))
    label: str = Field(sa_column=Column(String(64), primary_key=True))


class StepDependency(Row, table=True):
    """An arrow of the build's graph."""

    __tablename__ = "step_dependencies"
    step_id: str = Field(sa_column=Column(String(36), ForeignKey("steps.id"), primary_key=True))
    depends_on_id: str = Field(
        sa_column=Column(String(36), ForeignKey("steps.id"), primary_key=True, index=True)
    )
    build_id: str = Field(sa_column=Column(String(36), nullable=False, index=True))


class StepAttempt(Row, table=True):
    """The history: one row per attempt, ended once."""

    __tablename__ = "step_attempts"
    __table_args__ = (Index("ix_step_attempts_request", "runner_id", "request_id"),)
    step_id: str = Field(sa_column=Column(String(36), ForeignKey("steps.id"), primary_key=True))
    attempt: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    runner_id: str | None = Field(default=None, sa_column=Column(String(36)))
    request_id: str | None = Field(default=None, sa_column=Column(String(64)))
    outcome: str | None = Field(default=None, sa_column=Column(String(12)))
    reason: str | None = Field(default=None, sa_column=Column(String(32)))
    detail: str | None = long_text()
    exit_code: int | None = Field(default=None, sa_column=Column(Integer))
    oom: bool = Field(default=False, nullable=False)
    image_digest: str | None = long_text()
    output_paths: list[str] = json_field(list)
    secret_ids: str | None = long_text()
    log_size: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    log_sha256: str | None = Field(default=None, sa_column=Column(String(64)))
    log_state: str = Field(default="open", sa_column=Column(String(12), nullable=False))
    claimed_at: datetime = moment(nullable=False)
    started_at: datetime | None = moment()
    finished_at: datetime | None = moment()
    term_at: datetime | None = moment()
    dead_at: datetime | None = moment()
    cleaned_at: datetime | None = moment()
    leftovers: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))


class Cancel(Row, table=True):
    """The receipt of a cancellation; the build names the latest of its own."""

    __tablename__ = "cancels"
    id: str = own_id()
    build_id: str = Field(sa_column=Column(String(36), nullable=False, index=True))
    requested_at: datetime = moment(nullable=False)


class CancelStep(Row, table=True):
    """One step on a receipt, under the attempt that had to stop; 0 when there was none."""

    __tablename__ = "cancel_steps"
    cancel_id: str = Field(sa_column=Column(String(36), primary_key=True))
    step_id: str = Field(sa_column=Column(String(36), primary_key=True))
    attempt: int = Field(sa_column=Column(Integer, primary_key=True, autoincrement=False))
    build_id: str = Field(sa_column=Column(String(36), nullable=False, index=True))


class LogAppend(Row, table=True):
    """One accepted piece of a build's log: where it stands and when it came."""

    __tablename__ = "log_appends"
    build_id: str = Field(sa_column=Column(String(36), primary_key=True))
    seq: int = Field(sa_column=Column(BigInteger, primary_key=True, autoincrement=False))
    step_id: str = Field(sa_column=Column(String(36), nullable=False))
    attempt: int = Field(sa_column=Column(Integer, nullable=False))
    offset: int = Field(sa_column=Column("byte_offset", BigInteger, nullable=False))
    length: int = Field(sa_column=Column("byte_length", BigInteger, nullable=False))
    at: datetime = moment(nullable=False)


class Blob(Row, table=True):
    """Bytes that a project has stored under their digest."""

    __tablename__ = "blobs"
    __table_args__ = (Index("ix_blobs_sha256", "sha256"), Index("ix_blobs_unused", "unused_since"))
    project_id: str = Field(sa_column=Column(String(36), ForeignKey("projects.id"), primary_key=True))
    sha256: str = Field(sa_column=Column(String(64), primary_key=True))
    size: int = Field(sa_column=Column(BigInteger, nullable=False))
    created_at: datetime = moment(nullable=False)
    unused_since: datetime | None = moment()


class Artifact(Row, table=True):
    """One output of a step, visible once its completion was accepted."""

    __tablename__ = "artifacts"
    __table_args__ = (
        Index("ix_artifacts_step", "step_id", "build_id"),
        Index("ix_artifacts_blob", "build_id", "sha256"),
        Index("ix_artifacts_sha256", "sha256"),
    )
    id: str = own_id()
    build_id: str = reference("builds", index=False)
    step_id: str = reference("steps", index=False)
    attempt: int = Field(sa_column=Column(Integer, nullable=False))
    path: str = long_text(nullable=False)
    type: str = Field(sa_column=Column(String(12), nullable=False))
    mode: int = Field(sa_column=Column(Integer, nullable=False))
    size: int = Field(sa_column=Column(BigInteger, nullable=False))
    sha256: str = Field(sa_column=Column(String(64), nullable=False))
    target: str = long_text(nullable=False)
    created_at: datetime = moment(nullable=False)


class Tombstone(Row, table=True):
    """The id of something that retention has deleted, so that who asks for it hears what became of it."""

    __tablename__ = "tombstones"
    __table_args__ = (Index("ix_tombstones_age", "expired_at"),)
    id: str = own_id()
    kind: str = Field(sa_column=Column(String(12), nullable=False))
    project_id: str = Field(sa_column=Column(String(36), nullable=False))
    expired_at: datetime = moment(nullable=False)


class ClockMark(Row, table=True):
    """Where a coordinator's clock stood when so much time had passed since that boot of its machine."""

    __tablename__ = "clock_marks"
    boot_id: str = own_id()
    passed_ns: int = Field(sa_column=Column(BigInteger, nullable=False))
    at: datetime = moment(nullable=False)


class Runner(Row, table=True):
    """A machine that takes steps; known by its secret alone."""

    __tablename__ = "runners"
    id: str = own_id()
    name: str = Field(sa_column=Column(String(100), nullable=False))
    secret_hash: bytes = Field(sa_column=Column(LargeBinary(32), unique=True, nullable=False))
    former_secret_hash: bytes | None = Field(
        default=None, sa_column=Column(LargeBinary(32), unique=True, nullable=True)
    )
    rotate_requested_at: datetime | None = moment()
    tenant_id: str | None = reference("tenants", nullable=True)
    enrolment_token_id: str | None = Field(default=None, sa_column=Column(String(36)))
    labels: list[str] = json_field(list)
    platform: str = Field(default="", sa_column=Column(String(64), nullable=False))
    version: str = Field(default="", sa_column=Column(String(64), nullable=False))
    session: str | None = Field(default=None, sa_column=Column(String(64)))
    slots: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    draining: bool = Field(default=False, nullable=False)
    disk_free: int = Field(default=0, sa_column=Column(BigInteger, nullable=False))
    low_disk: bool = Field(default=False, sa_column=Column(Boolean, nullable=False, server_default=false()))
    paused_until: datetime | None = moment()
    pause_reason: str = Field(default="", sa_column=Column(String(200), nullable=False, server_default=""))
    created_at: datetime = moment(nullable=False)
    last_seen_at: datetime | None = moment()
    revoked_at: datetime | None = moment()


class AuditLog(Row, table=True):
    """What was changed, by whom; written in the change's own transaction, never altered."""

    __tablename__ = "audit_logs"
    __table_args__ = (
        Index("ix_audit_logs_project", "project_id", "id"),
        Index("ix_audit_logs_chain", "chain", "seq", unique=True, **only_where("seq IS NOT NULL")),
        Index("ix_audit_logs_unsealed", "id", **only_where("seq IS NULL")),
        Index("ix_audit_logs_tenant", "tenant_id", "id"),
    )
    id: str = own_id()
    tenant_id: str | None = Field(default=None, sa_column=Column(String(36)))
    project_id: str | None = Field(default=None, sa_column=Column(String(36)))
    action: str = Field(sa_column=Column(String(64), nullable=False, index=True))
    actor: str = Field(sa_column=Column(String(128), nullable=False))
    address: str = Field(default="", sa_column=Column(String(64), nullable=False))
    details: dict[str, Any] = json_field()
    created_at: datetime = moment(nullable=False)
    chain: str | None = Field(default=None, sa_column=Column(String(36)))
    seq: int | None = Field(default=None, sa_column=Column(BigInteger))
    hash: bytes | None = Field(default=None, sa_column=Column(LargeBinary(32)))
