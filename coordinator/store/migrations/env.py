"""Alembic's entry: migrates over the connection it is handed."""

from alembic import context

from coordinator import access_tables  # noqa: F401 - its rows belong to the schema
from coordinator.tables import Row

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=Row.metadata,
    render_as_batch=True,
    transaction_per_migration=True,
    compare_type=True,
)
with context.begin_transaction():
    context.run_migrations()
