"""The schema: what migrations make is what the tables say."""

from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from coordinator.actions.show_cancel import show_cancel
from coordinator.app import create_app
from coordinator.settings import Settings
from coordinator.store.dialect import Database
from coordinator.store.migrate import DatabaseIsNewer, _config, current_revision, head_revision, migrate
from coordinator.tables import Row
from tests.factories import LOCAL, ON_POSTGRES, together
from tests.fakes import MORNING, SettableClock

AT = "2026-03-01 08:00:00.000000"  # the morning; on Postgres in the zone of the session, UTC


def a_stored_build(build_id: str, number: int, **more: Any) -> tuple[str, dict[str, Any]]:
    fixed = {"project_id": "p", "workflow_id": "w", "workflow_version": 1, "is_project_repository": False}
    return "builds", {"id": build_id, "number": number, "round": 1, "created_at": AT, **fixed, **more}


def a_stored_step(step_id: str, build_id: str, position: int, **more: Any) -> tuple[str, dict[str, Any]]:
    nothing = dict.fromkeys(("rank", "label_count", "dependency_count", "infra_retries", "log_size"), 0)
    fixed = {"project_id": "p", "name": step_id, "round": 1, "spec": "{}", "image_url": "i"}
    row = {"id": step_id, "build_id": build_id, "position": position, "exclusive": False, **nothing, **fixed}
    return "steps", row | more


def an_attempt(step_id: str, attempt: int, **more: Any) -> tuple[str, dict[str, Any]]:
    ends = {"output_paths": "[]", "log_size": 0, "log_state": "gap", "oom": False}
    return "step_attempts", {"step_id": step_id, "attempt": attempt, "claimed_at": AT, **ends, **more}


MADE = {"created_at": AT, "updated_at": AT}
BEFORE = [
    ("tenants", {"id": "t", "account": "acme", "created_at": AT}),
    ("projects", {"id": "p", "tenant_id": "t", "name": "p", "last_build_number": 2, **MADE}),
    ("workflows", {"id": "w", "project_id": "p", "name": "w", "version": 1, **MADE}),
    a_stored_build("cancelled", 1, state="cancelled", cancel_id="the-cancel", cancel_requested_at=AT),
    a_stored_build("failed", 2, state="failed"),
    a_stored_step("held", "cancelled", 0, state="cancelled", attempt=2, cancel_requested_at=AT),
    a_stored_step("waited", "cancelled", 1, state="cancelled", attempt=0),
    a_stored_step("done", "cancelled", 2, state="succeeded", attempt=1),
    a_stored_step("other", "failed", 0, state="failed", attempt=1),
    an_attempt("held", 2, runner_id="r", started_at=AT),
]


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


def test_receipts_of_cancels_before_an_upgrade_can_be_asked_for(
    empty_database: Database, clock: SettableClock, tmp_path: Path
) -> None:
    with empty_database.writer.connect() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.commit()
        for table, row in BEFORE:
            names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
            connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"), row)
        connection.commit()

    lanes = create_app(Settings(data=tmp_path), database=empty_database, clock=clock).state.coordinator.lanes
    view = lanes.write_and_wait(lambda tx: show_cancel(tx, LOCAL, "the-cancel", now=clock()))
    lanes.close()

    assert (view.build_id, view.requested_at) == ("cancelled", MORNING)
    assert [(step.row.step_id, step.row.attempt, step.state, step.is_confirmed) for step in view.steps] == [
        ("held", 2, "cancelled", False),
        ("waited", 0, "cancelled", True),
    ]
