"""Brings a database to the schema of this version, and says when it is newer than that."""

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

from coordinator.store.dialect import Database

_LOCK = 0x6275696C  # one migration at a time on Postgres, whoever starts it


class DatabaseIsNewer(Exception):
    """This program is older than the database it was given."""


class DatabaseIsOlder(Exception):
    """The database lacks what this program expects, and nobody asked for a migration."""


def migrate(database: Database) -> str:
    """Run what is missing; returns the revision the database has now. Harmless when nothing is missing."""
    with database.writer.connect() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _LOCK})
            connection.commit()
        try:
            if _is_behind(connection):
                config = _config()
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()
        finally:
            if not database.is_sqlite:
                connection.rollback()
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": _LOCK})
                connection.commit()
    return head_revision()


def head_revision() -> str:
    return _scripts().get_current_head() or ""


def current_revision(database: Database) -> str | None:
    """The revision a database has; None for an empty one."""
    with database.writer.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def require_head(engine: Engine) -> None:
    """Only look: DatabaseIsOlder or DatabaseIsNewer where the schema is not that of this version."""
    with engine.connect() as connection:
        if _is_behind(connection):
            raise DatabaseIsOlder(f"the database has not the schema of this version, {head_revision()}")


def _is_behind(connection: Connection) -> bool:
    current = MigrationContext.configure(connection).get_current_revision()
    connection.rollback()
    if current == head_revision():
        return False
    known = {script.revision for script in _scripts().walk_revisions()}
    if current is not None and current not in known:
        raise DatabaseIsNewer(f"the database has revision {current}, which this version does not know")
    return True


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
