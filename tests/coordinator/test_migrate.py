"""The schema: what migrations make is what the tables say."""

from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from coordinator.store.dialect import Database
from coordinator.store.migrate import DatabaseIsNewer, current_revision, head_revision, migrate
from coordinator.tables import Row
from tests.factories import ON_POSTGRES, together


def test_the_migrated_schema_is_what_the_tables_say(database: Database) -> None:
    with database.writer.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, Row.metadata)

    assert differences == []


def test_migration_and_tables_make_the_same_constraints(database: Database, empty_database: Database) -> None:
    Row.metadata.create_all(empty_database.writer)

    assert names_in(database) == names_in(empty_database)


def names_in(database: Database) -> dict[str, Any]:
    inspector = inspect(database.writer)
    return {
        table: {
            "columns": sorted(
                (column["name"], str(column["type"]), column["nullable"])
                for column in inspector.get_columns(table)
            ),
            "primary": inspector.get_pk_constraint(table)["constrained_columns"],
            "foreign": sorted(
                (key["constrained_columns"], key["referred_table"])
                for key in inspector.get_foreign_keys(table)
            ),
            "unique": sorted(key["column_names"] for key in inspector.get_unique_constraints(table)),
            "indexes": sorted((key["name"], key["column_names"]) for key in inspector.get_indexes(table)),
        }
        for table in sorted(Row.metadata.tables)
    }


def test_a_fresh_database_is_brought_to_the_head_and_a_second_time_changes_nothing(
    empty_database: Database,
) -> None:
    assert current_revision(empty_database) is None

    assert migrate(empty_database) == head_revision()
    assert migrate(empty_database) == head_revision()

    assert current_revision(empty_database) == head_revision()


@ON_POSTGRES
def test_processes_that_start_together_migrate_once(empty_database: Database) -> None:
    answers = together(*[lambda: migrate(empty_database)] * 4)

    assert answers == [head_revision()] * 4


def test_a_database_of_a_newer_version_is_refused_and_left_alone(empty_database: Database) -> None:
    migrate(empty_database)
    with empty_database.writer.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999_from_the_future'"))

    with pytest.raises(DatabaseIsNewer, match="9999_from_the_future"):
        migrate(empty_database)

    assert current_revision(empty_database) == "9999_from_the_future"
