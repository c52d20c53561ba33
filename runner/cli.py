"""`buildmill runner`: flags and signals, and the parts put together."""

import ctypes
import os
import platform
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import structlog
from pydantic import ValidationError

from runner.agent import Agent
from runner.blobs import LocalBlobs
from runner.cache import CacheStore
from runner.client import Client
from runner.commands import drain, take_over
from runner.commands import handover as handover_command
from runner.control import Control, Obedience
from runner.credentials import Credentials, load_credentials
from runner.disk import MIB, DiskGuard
from runner.errors import BadSetup, LeaseLost, Refused, Revoked, Unauthorized, Unreachable
from runner.executor.base import Executor
from runner.git import unprivileged_user
from runner.janitor import Janitor
from runner.journal import open_journals
from runner.layers import choose_layers
from runner.means import Means
from runner.room import Marks
from runner.settings import Settings
from runner.source import SourceCache
from runner.state_dir import Identity, StateLock, former_ids, load_identity, save_identity
from runner.trash import Trash
from runner.workspace import Workspaces
from shared.protocol import Registration, Resume

log = structlog.get_logger()

PR_SET_PDEATHSIG = 1

Connect = Callable[[str, str], Client]  # the coordinator's address and the runner's secret


@click.group(invoke_without_command=True)
@click.option("--coordinator", help="Address of the coordinator (default http://127.0.0.1:3000).")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Folder of identity, workspaces, caches and journals, for one runner (default /var/lib/buildmill).",
)
@click.option("--slots", type=click.IntRange(1, 64), help="How many steps run at once (default 2).")
@click.option("--name", help="Name of the runner (default: the machine's and some letters).")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    help="File with an enrolment token or the registration token, read at the first start only.",
)
@click.option(
    "--labels", help="Labels that steps may ask for, separated by commas; kept from the first start on."
)
@click.option(
    "--only-labelled/--no-only-labelled",
    default=None,
    help="Take none of the steps that ask for no label (default: no).",
)
@click.option(
    "--executor",
    type=click.Choice(["docker", "process"]),
    help="docker isolates each step (default); process isolates nothing and needs no engine.",
)
@click.option(
    "--credentials",
    type=click.Path(path_type=Path),
    help="File (mode 0600) with logins of git hosts and image registries.",
)
@click.option(
    "--host-trust/--no-host-trust",
    default=None,
    help="Pass this machine's CA bundle, proxy and package index into containers (default: no).",
)
@click.option("--once", is_flag=True, help="End when there is nothing left to do.")
@click.option("--with-parent", is_flag=True, help="Hand over when the parent process dies.")
@click.option("--handover", is_flag=True, help="Take over from the process that runs on this state folder.")
@click.pass_context
def runner(context: click.Context, /, once: bool, with_parent: bool, handover: bool, **options: Any) -> None:
    """Take steps from a coordinator and run them on this machine.

    The first start registers the runner and keeps its secret in the state folder.
    TERM or INT: finish what runs, then end. A second time: stop what runs. USR2: end at once and leave
    everything running for the next process on the same state folder, as an upgrade does.

    Options with a value are also read from the environment as BUILDMILL_<OPTION>; docs/runner.md has more.
    """
    if context.invoked_subcommand is not None:
        if any(value is not None for value in options.values()) or once or with_parent or handover:
            raise click.UsageError(f"options stand behind the word {context.invoked_subcommand}")
        return
    settings = _read_settings(options)
    if not settings.coordinator.startswith(("http://", "https://")):
        raise click.BadParameter("must begin with http:// or https://", param_hint="--coordinator")
    state = settings.state.absolute()
    try:
        with _presence(take_over(state) if handover else StateLock(state), state) as control:
            if with_parent:
                hand_over_with_parent()
            if not live(settings, control, once=once):
                raise click.ClickException(
                    "the runner ends because of an error of its own; its log says which"
                )
    except BadSetup as error:
        raise click.ClickException(str(error)) from error


def live(settings: Settings, control: Control, *, once: bool, connect: Connect = Client) -> bool:
    """Until drained; a runner that the coordinator has forgotten gives up what it held and begins anew."""
    agent = make_agent(settings, once=once, connect=connect)
    obey_signals(lambda: agent)
    control.serve(
        Obedience(
            standing=lambda: agent.standing(),
            drain=lambda: agent.drain(),
            leave=leave_at_once,
        )
    )
    while True:
        is_well = agent.run()
        if agent.was_revoked:
            raise _revoked(settings)
        if not agent.was_forgotten or agent.is_draining:
            return is_well
        forgotten = agent
        agent = make_agent(settings, once=once, connect=connect)
        if forgotten.is_draining:
            agent.drain()  # it was told so meanwhile


runner.add_command(drain)
runner.add_command(handover_command)


def _read_settings(options: dict[str, Any]) -> Settings:
    try:
        return Settings(**{name: value for name, value in options.items() if value is not None})
    except ValidationError as error:
        said = "; ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise click.ClickException(f"settings: {said}") from error


@contextmanager
def _presence(lock: StateLock, state: Path) -> Iterator[Control]:
    """Be heard in the folder that the lock is for; at the end it is free before nobody is there any more."""
    try:
        control = _listen(state)
    except BadSetup:
        lock.release()
        raise
    with closing(control), lock:
        yield control


def _listen(state: Path) -> Control:
    try:
        return Control(state)
    except OSError as error:
        raise BadSetup(f"no socket can be made in {state}: {error.strerror}") from error


def make_agent(settings: Settings, *, once: bool = False, connect: Connect = Client) -> Agent:
    """Put the runner together, registering it if this state folder has no identity yet."""
    state = settings.state.absolute()
    identity = _known_identity(settings, state, connect) or _register(settings, state, connect)
    client = connect(settings.coordinator, identity.secret)
    credentials = load_credentials(settings.credentials)
    layers, sentence = choose_layers(state)
    click.echo(f"runner: {identity.runner_id}  coordinator: {settings.coordinator}  {sentence}")
    if identity.coordinator != settings.coordinator:
        click.echo(
            f"this runner registered with {identity.coordinator}; if {settings.coordinator} is another "
            f"coordinator, remove {state / 'identity.json'} to register there, which ends what still runs"
        )
    trash, formerly = Trash(state), frozenset(former_ids(state))
    means = Means(
        runner_id=identity.runner_id,
        client=client,
        executor=_open_executor(settings, identity, state, credentials, formerly),
        sources=SourceCache(
            state,
            protocols=settings.allowed_git_protocols,
            run_as=unprivileged_user(),
            credentials=credentials,
            environ=os.environ,
            trash=trash,
        ),
        workspaces=Workspaces(state, layers, trash),
        caches=CacheStore(state, layers, trash, max_bytes=settings.cache_bytes),
        blobs=LocalBlobs(state / "blobs", max_bytes=settings.blob_bytes),
        trash=trash,
        disk=_guard_disk(settings, state),
        secrets=tuple(secret.encode() for secret in credentials.secrets()),
        former_ids=formerly,
    )
    return Agent(
        means,
        state,
        slots=settings.slots,
        labels=settings.label_list,
        only_labelled=settings.only_labelled,
        platform=f"{platform.system()}-{platform.machine()}".lower(),
        version=_version(),
        once=once,
        janitor=Janitor(means, state, source_bytes=settings.source_bytes, marks=_marks(settings)),
    )


def _marks(settings: Settings) -> Marks:
    return Marks(settings.disk_high_percent, settings.disk_low_percent, settings.disk_reserve_mb * MIB)


def _guard_disk(settings: Settings, state: Path) -> DiskGuard:
    most = settings.step_disk_mb
    return DiskGuard(state, settings.disk_reserve_mb * MIB, None if most is None else most * MIB)


def _open_executor(
    settings: Settings, identity: Identity, state: Path, credentials: Credentials, formerly: frozenset[str]
) -> Executor:
    if settings.executor == "process":
        from runner.executor.process import ProcessExecutor

        click.echo("the process executor isolates nothing: steps run as this user on this machine")
        return ProcessExecutor(
            runner=identity.runner_id, state=state, environ=os.environ, former_ids=formerly
        )
    from runner.executor.docker import Limits, open_docker

    executor = open_docker(
        runner=identity.runner_id,
        state=state,
        environ=os.environ,
        limits=Limits(cpus=settings.step_cpus, memory_mb=settings.step_memory_mb, pids=settings.step_pids),
        host_trust=settings.host_trust,
        refuse_private=settings.refuse_private,
        holders_ahead=settings.holders_ahead,
        logins=credentials.registry,
        keep_images=settings.kept_images,
        former_ids=formerly,
    )
    for note in executor.notes:
        click.echo(note)
    return executor


def _known_identity(settings: Settings, state: Path, connect: Connect) -> Identity | None:
    """Who this runner is; None when it is new, or when the coordinator has forgotten it and it is idle."""
    identity = load_identity(state)
    if identity is None or open_journals(state):
        return identity
    client = connect(settings.coordinator, identity.secret)
    try:
        client.resume(Resume(session=secrets.token_hex(8)))
    except Revoked as error:
        raise _revoked(settings) from error
    except Unauthorized as error:
        if not error.is_unknown:
            return identity
        click.echo(f"the coordinator does not know runner {identity.runner_id}: registering anew")
        return None
    except (Unreachable, Refused, LeaseLost):
        return identity  # the agent goes on asking
    finally:
        client.close()
    return identity


def _revoked(settings: Settings) -> BadSetup:
    return BadSetup(
        f"the coordinator at {settings.coordinator} has revoked this runner; if that was a mistake, remove "
        f"{settings.state.absolute() / 'identity.json'} and start it with --token-file to register it anew"
    )


def _register(settings: Settings, state: Path, connect: Connect) -> Identity:
    said = Registration(
        name=settings.name or f"{socket.gethostname()[:60]}-{secrets.token_hex(3)}",
        labels=settings.label_list,
        platform=f"{platform.system()}-{platform.machine()}".lower(),
        version=_version(),
    )
    client = connect(settings.coordinator, "")
    try:
        answer = client.register(said, _read_token(settings.token_file))
    except Unauthorized as error:
        raise BadSetup(
            f"the coordinator at {settings.coordinator} does not let this runner in ({error}): --token-file "
            "names a file with an enrolment token, as `buildmill runners enrol` makes it, or with its "
            "registration token, which is keys/registration-token in its data folder"
        ) from error
    except Unreachable as error:
        raise BadSetup(
            f"the coordinator at {settings.coordinator} cannot be reached ({error}): "
            "start it, or name another address with --coordinator"
        ) from error
    except LeaseLost as error:
        raise BadSetup(
            f"no runner can register at {settings.coordinator} ({error}): name the coordinator's own address "
            "with --coordinator, without a path of its API"
        ) from error
    except Refused as error:
        raise BadSetup(f"the coordinator refuses to register this runner: {error}") from error
    finally:
        client.close()
    identity = Identity(answer.runner_id, answer.runner_secret, settings.coordinator)
    save_identity(state, identity)
    return identity


def _read_token(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"the token file {path} cannot be read: {error}") from error


def _version() -> str:
    try:
        return version("buildmill")
    except PackageNotFoundError:
        return "unknown"


def obey_signals(current: Callable[[], Agent]) -> None:
    """TERM or INT once drains, twice stops what runs; USR2 leaves at once, for the next process."""
    heard = 0

    def stop(_number: int, _frame: object) -> None:
        nonlocal heard
        heard += 1
        if heard == 1:
            current().drain()
        else:
            current().shut_down()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGUSR2, lambda _number, _frame: leave_at_once())


def leave_at_once() -> None:
    """What a kill does, but with a reason: everything the next process needs is in the journals."""
    with suppress(RuntimeError, OSError):  # a signal may come in the middle of a write
        sys.stdout.flush()
    os._exit(0)


def hand_over_with_parent() -> None:
    """Let the kernel send USR2 when the parent dies: its next start finds the work and no runner."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGUSR2) != 0:
        raise BadSetup(f"the parent cannot be watched: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGUSR2)  # it died a moment before
