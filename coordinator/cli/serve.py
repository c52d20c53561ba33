"""`buildmill coordinator` and `buildmill migrate`."""

import fcntl
import ipaddress
import os
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


@click.command()
@click.option("--host", help="Address to listen on (default 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on (default 3000).")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of database, logs, blobs and keys.")
@click.option("--database", help="Database URL; SQLite in the data folder when absent.")
@click.option("--auth", type=click.Choice(["open", "token"]), help="Who may call /api (default open).")
def coordinator(**options: Any) -> None:
    """Serve the APIs and hand out steps to runners."""
    from coordinator.api.server import make_server
    from coordinator.app import create_app

    settings = read_settings(options)
    refuse_open_doors(settings)
    prepare_data(settings.data)
    with only_process(settings):
        app = create_app(settings)
        server = make_server(
            app,
            host=settings.host,
            port=settings.port,
            header_deadline_s=settings.header_deadline,
        )
        click.echo(f"coordinator: http://{settings.host}:{settings.port}  data: {settings.data.absolute()}")
        server.run()


@click.command("migrate")
@click.option("--data", type=click.Path(path_type=Path), help="Folder of the SQLite database.")
@click.option("--database", help="Database URL; SQLite in the data folder when absent.")
def migrate_command(**options: Any) -> None:
    """Bring the database to the schema of this version."""
    from coordinator.store.dialect import open_database
    from coordinator.store.migrate import DatabaseIsNewer, migrate

    settings = read_settings(options)
    prepare_data(settings.data)
    with only_process(settings):
        database = open_database(settings.database_url)
        try:
            click.echo(f"the database is at revision {migrate(database)}")
        except DatabaseIsNewer as error:
            raise click.ClickException(str(error)) from error
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
    """The folder itself; nobody else reads what this process makes from here on."""
    os.umask(0o077)
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"cannot make the data folder {data}: {error.strerror}") from error


@contextmanager
def only_process(settings: Settings) -> Iterator[None]:
    """With SQLite one process has the data folder; a second one is told so."""
    if settings.database and not settings.database.startswith("sqlite"):
        yield
        return
    descriptor = os.open(settings.data / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise click.ClickException(f"another process uses the data folder {settings.data}") from error
    try:
        yield
    finally:
        os.close(descriptor)
