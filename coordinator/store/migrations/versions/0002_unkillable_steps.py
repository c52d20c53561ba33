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


def _retention() -> None:
    moment = UtcDateTime(timezone=True)
    op.add_column("projects", sa.Column("retention", sa.JSON(none_as_null=True), nullable=True))
    for name in ("artifacts_expired_at", "logs_expired_at", "expired_at"):
        op.add_column("builds", sa.Column(name, moment, nullable=True))
    op.add_column("blobs", sa.Column("unused_since", moment, nullable=True))
    op.create_index("ix_blobs_sha256", "blobs", ["sha256"])
    op.create_index("ix_blobs_unused", "blobs", ["unused_since"])
    op.create_index("ix_artifacts_sha256", "artifacts", ["sha256"])
    op.create_table(
        "tombstones",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("project_id", sa.String(length=36), nullable=False),
        sa.Column("expired_at", moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tombstones")),
    )
    op.create_index("ix_tombstones_age", "tombstones", ["expired_at"])
