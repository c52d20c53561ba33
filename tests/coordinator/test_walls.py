"""The database's own wall: where our questions forget the tenant, it still shows nothing of others."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from sqlalchemy import make_url, text

from coordinator.actions.cancel_build import cancel_build
from coordinator.api.state import AppState
from coordinator.rules.access import Caller
from coordinator.settings import Settings
from coordinator.store import walls
from coordinator.store.dialect import Database, open_database
from coordinator.store.lanes import Lanes
from coordinator.store.migrate import migrate
from coordinator.tables import Row
from tests.factories import LOCAL, ON_POSTGRES, ON_SQLITE, Mill

# Rows of no tenant: who there is, and what guards and remembers requests by their principal.
NOBODYS = {"users", "login_sessions", "login_counts", "kept_answers", "stream_tickets", "clock_marks"}


@ON_POSTGRES
def test_every_table_stands_behind_the_wall_or_is_nobodys(database: Database) -> None:
    question = text(
        "SELECT relname, relrowsecurity, has_table_privilege(:role, oid, 'SELECT') FROM pg_class "
        "WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace AND relname != 'alembic_version'"
    )
    with database.reader.connect() as connection:
        found = connection.execute(question, {"role": walls.ROLE}).all()

    assert {name for name, _, _ in found} == {table.name for table in Row.metadata.sorted_tables}
    assert {name for name, has_wall, _ in found if not has_wall} == NOBODYS
    assert all(may_be_looked_at for _, _, may_be_looked_at in found)


@ON_POSTGRES
def test_a_database_user_who_may_make_no_roles_goes_without_the_wall(
    database: Database, new_postgres_url: Callable[[str], str]
) -> None:
    url = make_url(new_postgres_url("unprivileged"))
    with database.writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("CREATE ROLE plain LOGIN PASSWORD 'plain'"))
        connection.execute(text("ALTER DATABASE unprivileged OWNER TO plain"))
    plain = open_database(url.set(username="plain", password="plain").render_as_string(hide_password=False))
    lanes = Lanes(plain)
    try:
        migrate(plain)

        assert not lanes.write_and_wait(walls.are_up)
    finally:
        lanes.close()
        plain.dispose()


@pytest.fixture
def closed(new_app: Any, new_client: Any, settings: Settings) -> httpx.Client:
    client: httpx.Client = new_client(new_app(settings.model_copy(update={"auth": "token"})))
    return client


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own questions forget whose rows they may show."""
    monkeypatch.setattr(Caller, "may_see_tenant", lambda *_: True)
    monkeypatch.setattr(Caller, "require_in", lambda *_: None)


def look_at_everything(mill: Mill, client: httpx.Client) -> dict[str, Any]:
    """What a member of `acme` is answered about what belongs to `other`."""
    member = mill.a_member("acme", "owner")
    project = mill.a_project("other")
    build = mill.a_build(project_id=project)
    (held,) = mill.acquire(mill.a_runner())
    mill.start(held)
    mill.append(held, 0, b"hello\n")
    cancel = mill.now(cancel_build, mill.site, LOCAL, build.id).cancel_id
    paths = [
        f"/api/projects/{project}",
        f"/api/projects/{project}/workflows",
        f"/api/projects/{project}/builds",
        f"/api/projects/{project}/secrets",
        f"/api/builds/{build.id}",
        f"/api/builds/{build.id}/artifacts",
        f"/api/cancels/{cancel}",
        f"/api/steps/{held.step_id}/log",
        f"/api/runner/{held.step_id}",
        f"/api/v1/builds/{build.id}",
        f"/api/v1/builds/{build.id}/status",
    ]
    return {path: client.get(path, headers=member).status_code for path in paths}


@ON_POSTGRES
def test_behind_the_wall_nothing_of_others_is_there(mill: Mill, closed: httpx.Client, careless: None) -> None:
    answers = look_at_everything(mill, closed)

    assert set(answers.values()) == {404}, answers


@ON_SQLITE
def test_without_the_wall_the_same_questions_show_everything(
    mill: Mill, closed: httpx.Client, careless: None
) -> None:
    answers = look_at_everything(mill, closed)

    assert set(answers.values()) == {200}, answers


@ON_POSTGRES
def test_lists_behind_the_wall_hold_only_ones_own(mill: Mill, closed: httpx.Client, careless: None) -> None:
    member = mill.a_member("acme", "owner")
    mine, theirs = mill.a_project("acme"), mill.a_project("other")

    def rows(tx: Any, table: str) -> list[Any]:
        walls.stand_behind(tx, [member["X-Tenant-ID"]], None)
        return list(tx.connection().execute(text(f"SELECT * FROM {table}")).all())

    assert [row.id for row in mill.tx(rows, "projects")] == [mine]
    assert theirs not in str(mill.tx(rows, "audit_logs"))
    assert len(mill.tx(rows, "tenants")) == 1


@ON_POSTGRES
def test_behind_the_wall_nothing_can_be_written_for_others(mill: Mill) -> None:
    mine, theirs = mill.a_tenant("acme"), mill.a_project("other")

    def take(tx: Any) -> int:
        walls.stand_behind(tx, [mine], None)
        changed = text("UPDATE projects SET name = 'mine' WHERE id = :id")
        return int(tx.connection().execute(changed, {"id": theirs}).rowcount)

    assert mill.tx(take) == 0


@ON_POSTGRES
def test_the_wall_ends_with_the_transaction(mill: Mill) -> None:
    project = mill.a_project("other")

    def hidden(tx: Any) -> int:
        walls.stand_behind(tx, [], None)
        return int(tx.connection().execute(text("SELECT count(*) FROM projects")).scalar_one())

    assert [mill.tx(hidden) for _ in range(8)] == [0] * 8

    def open_again(tx: Any) -> list[str]:
        return list(tx.connection().execute(text("SELECT id FROM projects")).scalars())

    assert [mill.tx(open_again) for _ in range(8)] == [[project]] * 8


def test_a_database_has_walls_where_it_can(database: Database, coordinator: AppState) -> None:
    assert coordinator.has_walls is not database.is_sqlite
