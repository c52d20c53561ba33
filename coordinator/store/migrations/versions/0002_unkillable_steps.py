"""Unkillable steps: receipts of cancels, limits, retention, secrets"""

import sqlalchemy as sa
from alembic import op

from coordinator.tables import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("builds", schema=None) as batch_op:
        batch_op.add_column(sa.Column("timeout_s", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("deadline_at", UtcDateTime(timezone=True), nullable=True))
    with op.batch_alter_table("runners", schema=None) as batch_op:
        batch_op.add_column(sa.Column("low_disk", sa.Boolean(), nullable=False, server_default=sa.false()))
        batch_op.add_column(sa.Column("paused_until", UtcDateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("pause_reason", sa.String(200), nullable=False, server_default=""))
    _retention()
    _secrets()
    _limits_and_cancels()
    op.create_table(
        "clock_marks",
        sa.Column("boot_id", sa.String(length=36), nullable=False),
        sa.Column("passed_ns", sa.BigInteger(), nullable=False),
        sa.Column("at", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("boot_id", name=op.f("pk_clock_marks")),
    )


def _retention() -> None:
    moment = UtcDateTime(timezone=True)
    op.add_column("projects", sa.Column("retention", sa.JSON(none_as_null=True), nullable=True))
    for name in ("artifacts_expired_at", "logs_expired_at", "expired_at"):
        op.add_column("builds", sa.Column(name, moment, nullable=True))
    for name in ("artifacts_expired_round", "logs_expired_round"):
        op.add_column("builds", sa.Column(name, sa.Integer(), nullable=False, server_default="0"))
    op.add_column("blobs", sa.Column("unused_since", moment, nullable=True))
    op.create_index("ix_blobs_sha256", "blobs", ["sha256"])
    op.create_index("ix_blobs_unused", "blobs", ["unused_since"])
    op.create_index("ix_artifacts_sha256", "artifacts", ["sha256"])
    op.drop_index("ix_artifacts_build_step", "artifacts")
    op.create_index("ix_artifacts_step", "artifacts", ["step_id", "build_id"])
    op.create_table(
        "tombstones",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("project_id", sa.String(length=36), nullable=False),
        sa.Column("expired_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tombstones")),
    )
    op.create_index("ix_tombstones_age", "tombstones", ["expired_at"])


def _secrets() -> None:
    op.add_column("step_attempts", sa.Column("secret_ids", sa.Text(), nullable=True))
    op.create_table(
        "project_secrets",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("project_id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=16), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("updated_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("retired_at", UtcDateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["project_id"], ["projects.id"], name=op.f("fk_project_secrets_project_id_projects")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_project_secrets")),
    )
    op.create_index("ix_project_secrets_name", "project_secrets", ["project_id", "name"])
    op.create_index("ix_project_secrets_retired", "project_secrets", ["retired_at"])


def _limits_and_cancels() -> None:
    with op.batch_alter_table("steps", schema=None) as batch_op:
        batch_op.add_column(sa.Column("user_retries", sa.Integer(), nullable=False, server_default="0"))
        batch_op.add_column(sa.Column("queue_limit_s", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("deadline_at", UtcDateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("cancel_force_at", UtcDateTime(timezone=True), nullable=True))
        batch_op.create_index(
            "ix_steps_queue_limit",
            ["queue_limit_s"],
            sqlite_where=sa.text("queue_limit_s IS NOT NULL"),
            postgresql_where=sa.text("queue_limit_s IS NOT NULL"),
        )
    with op.batch_alter_table("step_attempts", schema=None) as batch_op:
        batch_op.add_column(sa.Column("term_at", UtcDateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("dead_at", UtcDateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("cleaned_at", UtcDateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("leftovers", sa.JSON(), nullable=True))
    op.create_table(
        "cancels",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.Column("requested_at", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_cancels")),
    )
    with op.batch_alter_table("cancels", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_cancels_build_id"), ["build_id"], unique=False)
    op.create_table(
        "cancel_steps",
        sa.Column("cancel_id", sa.String(length=36), nullable=False),
        sa.Column("step_id", sa.String(length=36), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.PrimaryKeyConstraint("cancel_id", "step_id", "attempt", name=op.f("pk_cancel_steps")),
    )
    with op.batch_alter_table("cancel_steps", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_cancel_steps_build_id"), ["build_id"], unique=False)
    _receipts_of_earlier_cancels()


def _receipts_of_earlier_cancels() -> None:
    """Builds name the receipts of their cancels, which were not kept: what of them is still known."""
    op.execute(
        "INSERT INTO cancels (id, build_id, requested_at)"
        " SELECT cancel_id, id, COALESCE(cancel_requested_at, finished_at, created_at) FROM builds"
        " WHERE cancel_id IS NOT NULL"
    )
    # a step that was told to stop was held, under its last attempt; the others had never begun
    op.execute(
        "INSERT INTO cancel_steps (cancel_id, step_id, attempt, build_id)"
        " SELECT builds.cancel_id, steps.id,"
        " CASE WHEN steps.cancel_requested_at IS NULL THEN 0 ELSE steps.attempt END, builds.id"
        " FROM builds JOIN steps ON steps.build_id = builds.id"
        " WHERE builds.cancel_id IS NOT NULL"
        " AND (steps.state = 'cancelled' OR steps.cancel_requested_at IS NOT NULL)"
    )
