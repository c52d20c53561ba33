"""Accounts: users and their roles, tokens, the chain of the audit trail, builds that wait to be started"""

import sqlalchemy as sa
from alembic import op

from coordinator.store.dialect import is_sqlite
from coordinator.tables import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    _people()
    _protection()
    _columns()
    _name_tenants()
    keep_the_trail()
    op.execute(
        "UPDATE builds SET updated_at = coalesce(finished_at, cancel_requested_at, started_at, created_at)"
    )
    op.execute(
        "UPDATE steps SET tenant_id = "
        "(SELECT projects.tenant_id FROM projects WHERE projects.id = steps.project_id)"
    )


def _people() -> None:
    op.create_table(
        "users",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("email", sa.String(length=254), nullable=False),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("password_hash", sa.Text(), nullable=False),
        sa.Column("is_admin", sa.Boolean(), nullable=False),
        sa.Column("token_version", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("updated_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("disabled_at", UtcDateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_users")),
        sa.UniqueConstraint("email", name=op.f("uq_users_email")),
    )
    op.create_table(
        "api_tokens",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant_id", sa.String(length=36), nullable=False),
        sa.Column("user_id", sa.String(length=36), nullable=True),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("permissions", sa.JSON(), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("expires_at", UtcDateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", UtcDateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_api_tokens_tenant_id_tenants")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_api_tokens_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_tokens")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_api_tokens_token_hash")),
    )
    with op.batch_alter_table("api_tokens", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_api_tokens_tenant_id"), ["tenant_id"], unique=False)
        batch_op.create_index(batch_op.f("ix_api_tokens_user_id"), ["user_id"], unique=False)

    op.create_table(
        "enrolment_tokens",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("tenant_id", sa.String(length=36), nullable=True),
        sa.Column("name", sa.String(length=100), nullable=False),
        sa.Column("token_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("labels", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("max_uses", sa.Integer(), nullable=False),
        sa.Column("uses", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("expires_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", UtcDateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id"], ["tenants.id"], name=op.f("fk_enrolment_tokens_tenant_id_tenants")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_enrolment_tokens")),
        sa.UniqueConstraint("token_hash", name=op.f("uq_enrolment_tokens_token_hash")),
    )
    with op.batch_alter_table("enrolment_tokens", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_enrolment_tokens_tenant_id"), ["tenant_id"], unique=False)

    op.create_table(
        "login_sessions",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("user_id", sa.String(length=36), nullable=False),
        sa.Column("refresh_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("former_refresh_hash", sa.LargeBinary(length=32), nullable=True),
        sa.Column("token_version", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("refreshed_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("expires_at", UtcDateTime(timezone=True), nullable=False),
        sa.Column("ended_at", UtcDateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_login_sessions_user_id_users")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_login_sessions")),
        sa.UniqueConstraint("refresh_hash", name=op.f("uq_login_sessions_refresh_hash")),
    )
    with op.batch_alter_table("login_sessions", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_login_sessions_expires_at"), ["expires_at"], unique=False)
        batch_op.create_index(
            batch_op.f("ix_login_sessions_former_refresh_hash"), ["former_refresh_hash"], unique=False
        )
        batch_op.create_index(batch_op.f("ix_login_sessions_user_id"), ["user_id"], unique=False)

    op.create_table(
        "memberships",
        sa.Column("tenant_id", sa.String(length=36), nullable=False),
        sa.Column("user_id", sa.String(length=36), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.Column("created_at", UtcDateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_memberships_tenant_id_tenants")),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_memberships_user_id_users")),
        sa.PrimaryKeyConstraint("tenant_id", "user_id", name=op.f("pk_memberships")),
    )
    with op.batch_alter_table("memberships", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_memberships_user_id"), ["user_id"], unique=False)


def _protection() -> None:
    op.create_table(
        "kept_answers",
        sa.Column("principal", sa.String(length=128), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("status", sa.Integer(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("expires_at", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("principal", "key", name=op.f("pk_kept_answers")),
    )
    with op.batch_alter_table("kept_answers", schema=None) as batch_op:
        batch_op.create_index("ix_kept_answers_age", ["expires_at"], unique=False)

    op.create_table(
        "login_counts",
        sa.Column("key", sa.String(length=128), nullable=False),
        sa.Column("failures", sa.Integer(), nullable=False),
        sa.Column("window_ends_at", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_login_counts")),
    )
    with op.batch_alter_table("login_counts", schema=None) as batch_op:
        batch_op.create_index("ix_login_counts_age", ["window_ends_at"], unique=False)

    op.create_table(
        "stream_tickets",
        sa.Column("ticket_hash", sa.LargeBinary(length=32), nullable=False),
        sa.Column("build_id", sa.String(length=36), nullable=False),
        sa.Column("tenant_id", sa.String(length=36), nullable=False),
        sa.Column("credential", sa.String(length=128), nullable=False),
        sa.Column("user_id", sa.String(length=36), nullable=True),
        sa.Column("credential_expires_at", UtcDateTime(timezone=True), nullable=True),
        sa.Column("expires_at", UtcDateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("ticket_hash", name=op.f("pk_stream_tickets")),
    )
    with op.batch_alter_table("stream_tickets", schema=None) as batch_op:
        batch_op.create_index("ix_stream_tickets_age", ["expires_at"], unique=False)


def _columns() -> None:
    with op.batch_alter_table("audit_logs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("chain", sa.String(length=36), nullable=True))
        batch_op.add_column(sa.Column("seq", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("hash", sa.LargeBinary(length=32), nullable=True))
        batch_op.create_index(
            "ix_audit_logs_chain",
            ["chain", "seq"],
            unique=True,
            sqlite_where=sa.text("seq IS NOT NULL"),
            postgresql_where=sa.text("seq IS NOT NULL"),
        )
        batch_op.create_index("ix_audit_logs_tenant", ["tenant_id", "id"], unique=False)
        batch_op.create_index(
            "ix_audit_logs_unsealed",
            ["id"],
            unique=False,
            sqlite_where=sa.text("seq IS NULL"),
            postgresql_where=sa.text("seq IS NULL"),
        )

    with op.batch_alter_table("builds", schema=None) as batch_op:
        batch_op.add_column(sa.Column("retry_of", sa.String(length=36), nullable=True))
        batch_op.add_column(sa.Column("updated_at", UtcDateTime(timezone=True), nullable=True))

    with op.batch_alter_table("steps", schema=None) as batch_op:
        batch_op.add_column(sa.Column("tenant_id", sa.String(length=36), nullable=True))
        batch_op.create_index(
            "ix_steps_queue_tenant",
            ["tenant_id", "state", "ready_at", "id"],
            unique=False,
            sqlite_where=sa.text("state = 'ready'"),
            postgresql_where=sa.text("state = 'ready'"),
        )

    with op.batch_alter_table("runners", schema=None) as batch_op:
        batch_op.add_column(sa.Column("former_secret_hash", sa.LargeBinary(length=32), nullable=True))
        batch_op.add_column(sa.Column("rotate_requested_at", UtcDateTime(timezone=True), nullable=True))
        batch_op.add_column(sa.Column("tenant_id", sa.String(length=36), nullable=True))
        batch_op.add_column(sa.Column("enrolment_token_id", sa.String(length=36), nullable=True))
        batch_op.create_index(batch_op.f("ix_runners_tenant_id"), ["tenant_id"], unique=False)
        batch_op.create_unique_constraint(batch_op.f("uq_runners_former_secret_hash"), ["former_secret_hash"])
        batch_op.create_foreign_key(
            batch_op.f("fk_runners_tenant_id_tenants"), "tenants", ["tenant_id"], ["id"]
        )


def _name_tenants() -> None:
    """What the coordinator itself or a runner did in a project belongs to the project's tenant."""
    op.execute(
        "UPDATE audit_logs SET tenant_id = "
        "(SELECT projects.tenant_id FROM projects WHERE projects.id = audit_logs.project_id) "
        "WHERE tenant_id IS NULL AND project_id IS NOT NULL"
    )


_NEVER = "the audit trail is append-only"
_WAS_UNSEALED = "OLD.chain IS NULL AND OLD.seq IS NULL AND OLD.hash IS NULL"
_IS_SEALED = "NEW.chain IS NOT NULL AND NEW.seq IS NOT NULL AND NEW.hash IS NOT NULL"
_SAYINGS = ("id", "tenant_id", "project_id", "action", "actor", "address", "created_at")


def keep_the_trail() -> None:
    """Rows of the trail stay as they are; the one change is their place in the chain, and it comes once.

    Whatever makes the table anew loses this and has to say it again.
    """
    if is_sqlite(op.get_bind()):
        _keep_on_sqlite()
    else:
        _keep_on_postgres()


def _keep_on_sqlite() -> None:
    """A row that is replaced goes without a word to the triggers, so nothing may be there to replace."""
    same = " AND ".join(f"NEW.{name} IS OLD.{name}" for name in (*_SAYINGS, "details"))
    is_there = "EXISTS (SELECT 1 FROM audit_logs WHERE id = NEW.id)"
    is_taken = is_there.replace("id = NEW.id", "chain = NEW.chain AND seq = NEW.seq AND seq IS NOT NULL")
    is_first = f"{_WAS_UNSEALED} AND {_IS_SEALED} AND {same} AND NOT {is_taken}"
    is_new = "NEW.chain IS NULL AND NEW.seq IS NULL AND NEW.hash IS NULL"
    for name, when in (
        ("audit_logs_no_delete", "DELETE ON audit_logs"),
        ("audit_logs_no_change", f"UPDATE ON audit_logs WHEN NOT ({is_first})"),
        ("audit_logs_no_replace", f"INSERT ON audit_logs WHEN NOT ({is_new}) OR {is_there}"),
    ):
        op.execute(f"CREATE TRIGGER {name} BEFORE {when} BEGIN SELECT RAISE(ABORT, '{_NEVER}'); END")


def _keep_on_postgres() -> None:
    same = " AND ".join(f"NEW.{name} IS NOT DISTINCT FROM OLD.{name}" for name in _SAYINGS)
    same += " AND NEW.details::text IS NOT DISTINCT FROM OLD.details::text"
    is_new = "NEW.chain IS NULL AND NEW.seq IS NULL AND NEW.hash IS NULL"
    op.execute(
        "CREATE FUNCTION audit_logs_refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{_NEVER}'; END $$"
    )
    for name, when in (
        ("audit_logs_no_delete", "DELETE ON audit_logs FOR EACH ROW"),
        ("audit_logs_no_truncate", "TRUNCATE ON audit_logs FOR EACH STATEMENT"),
        (
            "audit_logs_no_change",
            f"UPDATE ON audit_logs FOR EACH ROW WHEN (NOT ({_WAS_UNSEALED} AND {_IS_SEALED} AND {same}))",
        ),
        ("audit_logs_no_replace", f"INSERT ON audit_logs FOR EACH ROW WHEN (NOT ({is_new}))"),
    ):
        op.execute(f"CREATE TRIGGER {name} BEFORE {when} EXECUTE FUNCTION audit_logs_refuse()")
