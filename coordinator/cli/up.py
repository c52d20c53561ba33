"""`buildmill up`: the coordinator and one runner in one terminal."""

import hashlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
import uvicorn

from coordinator.cli.serve import (
    address_of,
    explaining_the_database,
    listening,
    only_process,
    prepare_data,
    private_files,
    read_settings,
    refuse_open_doors,
    spare_the_collector,
)

if TYPE_CHECKING:
    from coordinator.api.state import AppState

READY_S = 60.0
STOP_S = 30.0
KILL_AFTER = 3


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on (default 3000; 0: any).")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of database, logs, blobs and keys (default ./buildmill-data).",
)
@click.option("--slots", type=click.IntRange(1, 64), default=2, show_default=True, help="Steps at once.")
@click.option(
    "--executor",
    type=click.Choice(["docker", "process"]),
    default="docker",
    show_default=True,
    help="docker isolates each step; process isolates nothing and needs no engine.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Folder of the runner (default: below the data folder; for root below /var/lib/buildmill).",
)
def up(slots: int, executor: str, state: Path | None, **options: Any) -> None:
    """Run the coordinator and one runner until interrupted.

    All of Buildmill on one machine, for one person: the API is open to local callers and to nobody else.
    Interrupted once, running steps are finished first; twice, they are stopped; a fourth time, the runner
    is killed and goes on with its steps at the next start.

    Runners on other machines: see docs/runner.md.
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
        address = address_of(door)
        spare_the_collector()
        thread = _serve(server, door)
        folder = state or default_runner_state(settings.data.absolute())
        runner = _start_runner(address, folder, slots, executor, settings.data)
        click.echo(f"up: {address}  try it: {address}/docs")
        _say_first_account(app.state.coordinator, address)
        click.echo("up: interrupt once to finish what runs, twice to stop it")
        _stop_in_order(runner)
        with known_as(settings, address):
            code = _wait(runner, thread)
        server.should_exit = True
        thread.join(STOP_S)
    sys.exit(code)


def _say_first_account(state: "AppState", address: str) -> None:
    """Once in the life of an installation somebody is told how to log in."""
    from coordinator.actions.make_first_account import make_first_account
    from coordinator.passwords import hash_password
    from coordinator.store.tenants import DEFAULT_ACCOUNT

    password = secrets.token_urlsafe(18)
    hashed, now = hash_password(password), state.clock()
    made = state.lanes.write_and_wait(
        lambda tx: make_first_account(tx, DEFAULT_ACCOUNT, password_hash=hashed, now=now)
    )
    if made is None:
        return
    click.echo("up: the first user, shown this once:")
    click.echo(f"up:   log in at {address}/api/v1/auth/login as {made.email} with password {password}")
    click.echo(f"up:   X-Tenant-ID: {made.tenant_id}  (account {made.account})")
    click.echo(f"up:   token for programs: {made.token}")


def default_runner_state(data: Path) -> Path:
    """Where git, as another user, can get in: below the data folder only for runners that are not root."""
    if os.geteuid() != 0:
        return data / "runner"
    return Path("/var/lib/buildmill") / hashlib.sha256(str(data).encode()).hexdigest()[:12]


def _serve(server: uvicorn.Server, door: socket.socket) -> threading.Thread:
    thread = threading.Thread(target=server.run, args=([door],), name="coordinator", daemon=True)
    thread.start()
    deadline = time.monotonic() + READY_S
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise click.ClickException("the coordinator did not start; its own log above says why")
        time.sleep(0.02)
    return thread


def _start_runner(
    address: str, state: Path, slots: int, executor: str, data: Path
) -> "subprocess.Popen[bytes]":
    argv = [sys.executable, "-m", "coordinator", "runner", "--coordinator", address]
    argv += ["--state", str(state), "--slots", str(slots), "--executor", executor]
    argv += ["--token-file", str(data / "keys" / "registration-token"), "--with-parent"]
    # a session of its own: an interrupt of the terminal reaches it through us, in order
    return subprocess.Popen(argv, start_new_session=True, umask=0o022)


def _stop_in_order(runner: "subprocess.Popen[bytes]") -> None:
    heard = 0

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal heard
        heard += 1
        runner.send_signal(signal.SIGKILL if heard > KILL_AFTER else signal.SIGTERM)

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)


def _wait(runner: "subprocess.Popen[bytes]", coordinator: threading.Thread) -> int:
    while True:
        try:
            return max(0, runner.wait(timeout=1.0))
        except subprocess.TimeoutExpired:
            if not coordinator.is_alive():
                runner.terminate()
                return 1
