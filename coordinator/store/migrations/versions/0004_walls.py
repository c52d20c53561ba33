"""Walls between tenants: a role without rights of its own, and a policy for each table it may look into"""

from alembic import op

from coordinator.store.dialect import is_sqlite

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

ROLE = "buildmill_tenant"
_MINE = "string_to_array(current_setting('buildmill.tenants', true), ',')"
_OF_PROJECT = "project_id IN (SELECT id FROM projects)"
_OF_BUILD = "build_id IN (SELECT id FROM builds)"
_OF_STEP = "step_id IN (SELECT id FROM steps)"
_OF_WORKFLOW = "workflow_id IN (SELECT id FROM workflows)"

# Table -> whose rows are there at all.
POLICIES = {
    "tenants": f"id = ANY ({_MINE})",
    "projects": f"tenant_id = ANY ({_MINE})",
    "docker_images": f"tenant_id = ANY ({_MINE})",
    "memberships": f"tenant_id = ANY ({_MINE})",
    "api_tokens": f"tenant_id = ANY ({_MINE})",
    "enrolment_tokens": f"tenant_id = ANY ({_MINE})",
    "runners": f"tenant_id = ANY ({_MINE})",
    "audit_logs": f"tenant_id = ANY ({_MINE})",
    "workflows": _OF_PROJECT,
    "builds": _OF_PROJECT,
    "steps": _OF_PROJECT,
    "blobs": _OF_PROJECT,
    "project_secrets": _OF_PROJECT,
    "tombstones": _OF_PROJECT,
    "workflow_versions": _OF_WORKFLOW,
    "workflow_images": _OF_WORKFLOW,
    "step_dependencies": _OF_BUILD,
    "artifacts": _OF_BUILD,
    "log_appends": _OF_BUILD,
    "cancels": _OF_BUILD,
    "cancel_steps": _OF_BUILD,
    "step_labels": _OF_STEP,
    "step_attempts": _OF_STEP,
}
# What may be looked at besides.
COMMON = {
    "docker_images": "public OR tenant_id = current_setting('buildmill.commons', true)",
    "runners": "tenant_id IS NULL",
}
# What may be written besides.
WRITABLE = {"audit_logs": "tenant_id IS NULL"}
# Rows of nobody's tenant: who there is, and what guards and remembers requests by their principal.
OPEN = frozenset(
    {
        "users",
        "login_sessions",
        "login_counts",
        "kept_answers",
        "stream_tickets",
        "clock_marks",
    }
)
# A database user that may not make roles goes without the second wall; docs/operations.md says the remedy.
_MAKE_ROLE = """
DO $$ BEGIN
  IF NOT EXISTS (SELECT 1 FROM pg_roles WHERE rolname = 'the_role') THEN CREATE ROLE the_role NOLOGIN; END IF;
  EXECUTE format('GRANT the_role TO %I', current_user);
EXCEPTION
  WHEN duplicate_object OR unique_violation OR insufficient_privilege THEN NULL;
END $$
"""
_LET_IN = """
DO $$ BEGIN
  IF EXISTS (SELECT 1 FROM pg_roles WHERE rolname = 'the_role') THEN
    EXECUTE format('GRANT USAGE ON SCHEMA %I TO the_role', current_schema());
    GRANT SELECT, INSERT, UPDATE, DELETE ON the_tables TO the_role;
  END IF;
END $$
"""


def upgrade() -> None:
    if is_sqlite(op.get_bind()):
        return
    tables = ", ".join(sorted({*POLICIES, *OPEN}))
    for statement in (_MAKE_ROLE, _LET_IN):
        op.execute(statement.replace("the_role", ROLE).replace("the_tables", tables))
    for table, condition in POLICIES.items():
        op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
        op.execute(f"CREATE POLICY own ON {table} USING ({condition}) WITH CHECK ({condition})")
    for table, condition in COMMON.items():
        op.execute(f"CREATE POLICY common ON {table} FOR SELECT USING ({condition})")
    for table, condition in WRITABLE.items():
        op.execute(f"CREATE POLICY writable ON {table} FOR INSERT WITH CHECK ({condition})")
