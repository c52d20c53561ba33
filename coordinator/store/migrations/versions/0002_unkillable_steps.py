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
