"""How a command of an operator reaches the coordinator: over HTTP where one runs, else by itself.

On the machine of the coordinator a command finds its address and the operator's token below the data folder.
Where none runs, the command opens the database itself, while nobody else can.
"""

import fcntl
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import httpx

from coordinator.cli.serve import (
    LOCK_FILE,
    DataFolderInUse,
    explaining_the_database,
    only_process,
    private_files,
    read_settings,
)
from coordinator.settings import Settings

TIMEOUT_S = 60.0
HEALTH_S = 10.0
PAGE = 1000
ADDRESS_FILE = "address"
MAX_ADDRESS = 1024
_HERE = "http://127.0.0.1"


def administers(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options that say where the coordinator is, and a `Desk` to speak to it."""

    @click.option("--coordinator", "address", help="Address of the coordinator; needs --token-file.")
    @click.option("--token-file", type=click.File(), help="File with the operator's token.")
    @click.option(
        "--data", type=click.Path(path_type=Path), help="Its data folder (default ./buildmill-data)."
    )
    @click.option("--database", help="Its database URL, where no coordinator runs.")
    @functools.wraps(command)
    def wrapped(
        address: str | None, token_file: Any, data: Path | None, database: str | None, **options: Any
    ) -> None:
        token = read_token(token_file) if token_file else None
        with reaching(address, token, {"data": data, "database": database}) as desk:
            command(desk, **options)

    return wrapped


def read_token(file: Any) -> str:
    """The token that a file holds."""
    try:
        token = str(file.read()).strip()
    except UnicodeDecodeError:
        token = ""
    if not token or not token.isascii() or not token.isprintable():
        raise click.ClickException(f"{file.name} holds no token")
    return token


def segment(text: str) -> str:
    """What was typed as one segment of a path, whatever it is."""
    return quote(text, safe="", errors="replace")


class Desk:
    """Asks the coordinator; what it refuses is said in one line, and nothing has changed."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def ask(self, method: str, path: str, *, tenant: str | None = None, **more: Any) -> Any:
        """The answer's JSON, None where it has none. `tenant` is the id that the request is about."""
        headers = {"X-Tenant-ID": tenant} if tenant else {}
        try:
            answer = self._client.request(method, path, headers=headers, **more)
        except httpx.HTTPError as error:
            raise click.ClickException(f"the coordinator does not answer: {error}") from error
        except httpx.InvalidURL as error:
            raise click.BadParameter(str(error), param_hint="--coordinator") from error
        except UnicodeEncodeError as error:
            raise click.UsageError("what was typed is no text in UTF-8") from error
        if not answer.is_success:
            raise click.ClickException(_refusal(answer))
        try:
            return answer.json() if answer.content else None
        except ValueError as error:
            raise click.ClickException(
                f"what answers at {self._client.base_url} is no coordinator"
            ) from error

    def pages(self, path: str, *, tenant: str | None = None, **query: Any) -> Iterator[Any]:
        """Every item of a list that is answered in pages."""
        offset = 0
        while True:
            params = {**query, "limit": PAGE, "offset": offset}
            found = self.ask("GET", path, tenant=tenant, params=params)
            yield from found
            if len(found) < PAGE:
                return
            offset += PAGE

    def tenant(self, account: str) -> dict[str, Any]:
        """The tenant of an account or id."""
        found = self.ask("GET", "/api/tenants", params={"account": account})
        if not found:
            raise click.ClickException(f"there is no tenant {account}; `buildmill tenant list` shows them")
        tenant: dict[str, Any] = found[0]
        return tenant

    def user(self, email: str) -> dict[str, Any]:
        """The user of an e-mail address."""
        found = self.ask("GET", "/api/users", params={"email": email})
        if not found:
            raise click.ClickException(f"there is no user {email}; `buildmill user list` shows them")
        user: dict[str, Any] = found[0]
        return user


def _refusal(answer: httpx.Response) -> str:
    try:
        said = answer.json()
        faults = "; ".join(f"{fault['path']}: {fault['reason']}" for fault in said.get("details", ()))
        return f"{said['error']} ({faults})" if faults else str(said["error"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"the coordinator answered {answer.status_code}"


@contextmanager
def reaching(address: str | None, token: str | None, options: dict[str, Any]) -> Iterator[Desk]:
    """A desk at the coordinator that was named, or at the one of the data folder."""
    if address is not None:
        if not address.startswith(("http://", "https://")):
            raise click.BadParameter("must begin with http:// or https://", param_hint="--coordinator")
        if token is None:
            raise click.UsageError("--coordinator needs --token-file")
        _require_coordinator(address)
        with _client(address, token) as client:
            yield Desk(client)
        return
    settings = read_settings(options)
    require_data_folder(settings)
    running = find_running(settings)
    if running is not None:
        with _client(running, token or _operator_token(settings)) as client:
            yield Desk(client)
        return
    _require_installation(settings)
    with _alone(settings) as desk:
        yield desk


def _client(address: str, token: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=address, headers=headers, timeout=TIMEOUT_S, trust_env=False)


def require_data_folder(settings: Settings) -> None:
    """A folder that is there and can be looked into."""
    try:
        is_there = settings.data.is_dir()
    except OSError as error:
        raise _unusable(settings, error) from error
    if not is_there:
        raise click.ClickException(f"there is no data folder {settings.data}; name one with --data")


def _require_installation(settings: Settings) -> None:
    """What a coordinator left, or nothing at all: nobody's other folder becomes a new installation.

    Nor does one whose coordinator has its database elsewhere get another one beside it.
    """
    try:
        found = {path.name for path in settings.data.iterdir()} - {LOCK_FILE}
    except OSError as error:
        raise _unusable(settings, error) from error
    if found and "keys" not in found:
        raise click.ClickException(
            f"{settings.data} is not the data folder of a coordinator; name it with --data"
        )
    if found and not settings.database and not settings.sqlite_file.exists():
        raise click.ClickException(
            f"there is no database {settings.sqlite_file}; name the coordinator's with --database"
        )


def find_running(settings: Settings) -> str | None:
    """The address of the coordinator that uses this data folder, if one answers there.

    It holds its address while it lives: what a killed one has left may be somebody else's by now.
    """
    try:
        with (settings.data / ADDRESS_FILE).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                address = file.read(MAX_ADDRESS).decode("ascii", "replace").strip()
            else:
                return None
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(settings, error) from error
    return address if _is_coordinator(address) else None


def _is_coordinator(address: str) -> bool:
    """Whether a coordinator answers there; ClickException where nobody does."""
    try:
        answer = httpx.get(f"{address}/healthz", timeout=HEALTH_S, trust_env=False)
        return answer.status_code == 200 and answer.json() == {"status": "ok"}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise click.ClickException(f"the coordinator does not answer: {error}") from error
    except ValueError:
        return False


def _require_coordinator(address: str) -> None:
    if not _is_coordinator(address):
        raise click.ClickException(f"what answers at {address} is no coordinator")


def _unusable(settings: Settings, error: OSError) -> click.ClickException:
    return click.ClickException(f"the data folder {settings.data} cannot be used: {error.strerror}")


def _operator_token(settings: Settings) -> str:
    path = settings.data / "keys" / "admin-token"
    try:
        return path.read_text().strip()
    except OSError as error:
        raise click.ClickException(f"{path} cannot be read: {error.strerror}") from error


@contextmanager
def known_as(settings: Settings, address: str) -> Iterator[None]:
    """While a coordinator runs, its address stands in its data folder."""
    path = settings.data / ADDRESS_FILE
    temporary = path.with_name(f".{ADDRESS_FILE}.{os.getpid()}")
    with temporary.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{address}\n")
        file.flush()
        temporary.rename(path)
        try:
            yield
        finally:
            if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                path.unlink()


@contextmanager
def _alone(settings: Settings) -> Iterator[Desk]:
    """No coordinator runs: the same requests, answered in this process."""
    from coordinator.app import create_app
    from coordinator.cli.in_process import InProcess

    try:
        with only_process(settings), private_files():
            with explaining_the_database():
                app = create_app(settings)
            headers = {"Authorization": f"Bearer {_operator_token(settings)}"}
            lanes = app.state.coordinator.lanes
            try:
                with httpx.Client(
                    base_url=_HERE, headers=headers, transport=InProcess(app), timeout=TIMEOUT_S
                ) as client:
                    yield Desk(client)
            finally:
                lanes.close()
                lanes.database.dispose()
    except DataFolderInUse as error:
        raise click.ClickException(
            f"a coordinator uses the data folder {settings.data} and does not answer at its address: "
            "wait until it has started, or name it with --coordinator and --token-file"
        ) from error
