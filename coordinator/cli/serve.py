"""`buildmill coordinator` and `buildmill migrate`."""

import errno
import fcntl
import gc
import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import structlog
from pydantic import ValidationError

from coordinator.settings import Settings
from shared.plan import shape_faults

log = structlog.get_logger()

BACKLOG = 2048
LOCK_FILE = "lock"
COLLECT_AFTER = (20_000, 20, 20)  # objects, and rounds of the younger of three generations


@click.command()
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on (default 3000; 0: any).")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of database, logs, blobs and keys (default ./buildmill-data).",
)
@click.option("--database", help="Database URL; SQLite in the data folder when absent.")
@click.option(
    "--auth",
    type=click.Choice(["open", "token"]),
    help="open: every local caller, loopback only (default). token: callers need a token.",
)
def coordinator(**options: Any) -> None:
    """Serve the APIs and hand out steps to runners.

    The first start makes the data folder with its database and its keys: admin-token is for callers of
    the API, registration-token for runners. TERM or INT stops it; running steps do not notice.

    Every option is also read from the environment as BUILDMILL_<OPTION>; docs/configuration.md has more.
    """
    from coordinator.api.server import make_server
    from coordinator.app import create_app
    from coordinator.cli.administer import known_as

    settings = read_settings(options)
    refuse_open_doors(settings)
    prepare_data(settings.data)
    with private_files(), only_process(settings), listening(settings) as door:
        with explaining_the_database():
            app = create_app(settings)
        server = make_server(
            app,
            host=settings.host,
            port=settings.port,
            header_deadline_s=settings.header_deadline,
            before_shutdown=app.state.coordinator.bell.close,
        )
        click.echo(f"coordinator: {address_of(door)}  data: {settings.data.absolute()}")
        with known_as(settings, address_of(door)):
            spare_the_collector()
            server.run(sockets=[door])


@click.command("migrate")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of the SQLite database (default ./buildmill-data).",
)
@click.option("--database", help="Database URL; SQLite in the data folder when absent.")
def migrate_command(**options: Any) -> None:
    """Bring the database to the schema of this version.

    `buildmill coordinator` does the same at its start; run this where the upgrade is to be a step of its own.
    """
    from coordinator.store.dialect import open_database
    from coordinator.store.migrate import migrate

    settings = read_settings(options)
    prepare_data(settings.data)
    with private_files(), only_process(settings), explaining_the_database():
        database = open_database(settings.database_url)
        try:
            click.echo(f"the database is at revision {migrate(database)}")
        finally:
            database.dispose()


def read_settings(options: dict[str, Any]) -> Settings:
    """The environment, then the command line; what is wrong is said in one line each."""
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        lines = [f"{fault.path}: {fault.reason}" for fault in shape_faults(error)]
        raise click.ClickException("settings: " + "; ".join(lines)) from error


def refuse_open_doors(settings: Settings) -> None:
    """Open access is a local user's trust: it never listens beyond loopback."""
    if settings.auth != "open" or settings.host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise click.ClickException(
            f"--auth open listens on loopback only, not on {settings.host}; use --auth token"
        )


def prepare_data(data: Path) -> None:
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot make the data folder {data}: {error.strerror}") from error


@contextmanager
def private_files() -> Iterator[None]:
    """What is made in here is for this user's eyes only."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


class DataFolderInUse(click.ClickException):
    """Another process has the data folder, and SQLite takes one."""


@contextmanager
def only_process(settings: Settings) -> Iterator[None]:
    """With SQLite one process has the data folder; a second one is told so."""
    if settings.database and not settings.database.startswith("sqlite"):
        yield
        return
    try:
        descriptor = os.open(settings.data / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise click.ClickException(
            f"the data folder {settings.data} cannot be used: {error.strerror}"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataFolderInUse(
            f"another process uses the data folder {settings.data}: stop it or name another --data"
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """The socket of --host and --port, bound before anything else is touched."""
    where = f"{settings.host}, port {settings.port}"
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        door = socket.socket(family, kind, protocol)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {where}: {error.strerror}") from error
    with door:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(place)
            door.listen(BACKLOG)
        except OSError as error:
            raise click.ClickException(f"cannot listen on {where}: {_why_not_bound(error)}") from error
        yield door


def spare_the_collector() -> None:
    """What has been made by now stays to the end: the collector of garbage need not walk it time and again.

    New objects are looked through in larger lots, as most of them have gone by themselves by then.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)


def _why_not_bound(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "the port is taken; stop what listens there or name another --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine does not have that address; name one of its own with --host"
    if error.errno == errno.EACCES:
        return "this user may not; ports below 1024 need privileges"
    return str(error.strerror)


def address_of(door: socket.socket) -> str:
    """The URL of a bound socket, with the port it really got."""
    host, port = door.getsockname()[:2]
    return f"http://[{host}]:{port}" if door.family == socket.AF_INET6 else f"http://{host}:{port}"


@contextmanager
def explaining_the_database() -> Iterator[None]:
    """What an operator can mend is said in one line."""
    from coordinator.keys import UnusableKeys
    from coordinator.store.dialect import UnusableDatabase, saying_what_is_wrong
    from coordinator.store.migrate import DatabaseIsNewer

    try:
        with saying_what_is_wrong():
            yield
    except (UnusableDatabase, UnusableKeys) as error:
        raise click.ClickException(str(error)) from error
    except DatabaseIsNewer as error:
        raise click.ClickException(f"{error}: start the newer version again, or restore a backup") from error
