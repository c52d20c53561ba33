"""The only file that knows all parts: puts the coordinator together."""

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncIterator
from importlib.metadata import PackageNotFoundError, version

import structlog
from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.api.auth import Doorkeeper
from coordinator.api.build_server.account_routes import ENDPOINTS as ACCOUNT_ENDPOINTS
from coordinator.api.build_server.enrolment_routes import ENDPOINTS as ENROLMENT_ENDPOINTS
from coordinator.api.build_server.routes import ENDPOINTS
from coordinator.api.build_server.runner_routes import ENDPOINTS as RUNNER_ENDPOINTS
from coordinator.api.denials import UNKNOWN, Denials
from coordinator.api.dispatch import Application, TreeRouter
from coordinator.api.endpoint import routes_of
from coordinator.api.executions.auth_routes import ENDPOINTS as AUTH_ENDPOINTS
from coordinator.api.executions.log_routes import ENDPOINTS as LOG_ENDPOINTS
from coordinator.api.executions.operations import PREFIX as EXECUTIONS
from coordinator.api.executions.problems import executions_form
from coordinator.api.executions.project_routes import ENDPOINTS as EXECUTION_PROJECT_ENDPOINTS
from coordinator.api.executions.routes import ENDPOINTS as EXECUTION_ENDPOINTS
from coordinator.api.executions.stream_routes import SOCKETS
from coordinator.api.guards import CanonicalPath, SameOrigin, SecurityHeaders, TrustedHost
from coordinator.api.openapi import specification
from coordinator.api.plain import PLAIN_ENDPOINTS
from coordinator.api.problems import Refusal, build_server_form
from coordinator.api.rate_limit import RateLimited
from coordinator.api.state import AppState
from coordinator.api.websockets import sockets_of
from coordinator.bell import Bell
from coordinator.chores import do_chores
from coordinator.keys import (
    UnusableKeys,
    checkpoints_path,
    load_access_tokens,
    load_audit_key,
    load_credentials,
    load_lease_key,
    load_secret_keys,
)
from coordinator.rules.access import Audience, Caller
from coordinator.sealer import Sealer, seal_the_trail
from coordinator.settings import Settings
from coordinator.site import Site
from coordinator.store.blob_files import BlobFiles
from coordinator.store.checkpoint_file import CheckpointFile
from coordinator.store.dialect import Database, open_database
from coordinator.store.lanes import Lanes
from coordinator.store.log_files import LogFiles
from coordinator.store.migrate import migrate
from coordinator.store.project_secrets import list_key_ids
from coordinator.store.tenants import DEFAULT_ACCOUNT, ensure_tenant
from coordinator.store.walls import are_up
from coordinator.timekeeping import THIS_MACHINE, Machine, begin_clock, keep_time
from coordinator.upkeep import do_upkeep
from shared.clock import Clock, SteadyClock

log = structlog.get_logger()

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
ALL_ENDPOINTS = [
    *ENDPOINTS,
    *RUNNER_ENDPOINTS,
    *ENROLMENT_ENDPOINTS,
    *ACCOUNT_ENDPOINTS,
    *AUTH_ENDPOINTS,
    *EXECUTION_ENDPOINTS,
    *LOG_ENDPOINTS,
    *EXECUTION_PROJECT_ENDPOINTS,
    *PLAIN_ENDPOINTS,
]


def create_app(
    settings: Settings,
    *,
    database: Database | None = None,
    clock: Clock | None = None,
    machine: Machine = THIS_MACHINE,
) -> Starlette:
    """The whole coordinator as one ASGI application. A database that is handed in is not closed here.

    Without a `clock` it has the one that the database knows, as the machine counts on.
    """
    opened = database or open_database(
        settings.database_url, readers=settings.read_lanes, writers=settings.write_lanes
    )
    migrate(opened)
    lanes = Lanes(opened, writers=settings.write_lanes, readers=settings.read_lanes)
    try:
        clock = clock or begin_clock(lanes, machine)
        state = _make_state(settings, lanes, clock)
        denials = Denials(state)
        checkpoints = CheckpointFile(checkpoints_path(settings.data), load_audit_key(settings.data))
    except UnusableKeys:
        lanes.close()
        raise

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(do_chores(state)), asyncio.create_task(do_upkeep(state))]
        sealer = Sealer(state, denials, checkpoints)
        tasks.append(asyncio.create_task(seal_the_trail(sealer)))
        if isinstance(clock, SteadyClock):
            tasks.append(asyncio.create_task(keep_time(lanes, clock, machine)))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):  # it had failed before: no reason to leave lanes open
                    log.error("background_task_failed", exc_info=ended)
            await asyncio.to_thread(lanes.close)
            if database is None:
                opened.dispose()

    doorkeeper = Doorkeeper(state)
    routes = routes_of(ALL_ENDPOINTS, state, doorkeeper, denials)
    sockets = sockets_of(SOCKETS, state, doorkeeper, denials)
    app = Application(TreeRouter(routes, default=_nothing_there, lifespan=lifespan, sockets=sockets))
    app.state.coordinator = state
    app.state.denials = denials
    _add_guards(app, settings, state, doorkeeper, denials)
    return app


def _make_state(settings: Settings, lanes: Lanes, clock: Clock) -> AppState:
    now = clock()
    tenant = lanes.write_and_wait(lambda tx: ensure_tenant(tx, DEFAULT_ACCOUNT, now=now).id)
    site = Site(
        settings=settings,
        lease_key=load_lease_key(settings.data),
        secret_keys=load_secret_keys(settings.data, lanes.write_and_wait(list_key_ids)),
        access_tokens=load_access_tokens(settings.data),
        logs=LogFiles(settings.data / "logs"),
        blobs=BlobFiles(settings.data / "blobs"),
        default_tenant_id=tenant,
        started_at=now,
    )
    specified = _specified(is_open=settings.auth == "open")
    return AppState(
        settings,
        lanes,
        site,
        Bell(),
        clock,
        load_credentials(settings.data),
        specified,
        has_walls=lanes.write_and_wait(are_up),
    )


@functools.cache
def _specified(*, is_open: bool) -> bytes:
    try:
        installed = version("buildmill")
    except PackageNotFoundError:
        installed = "unknown"  # run from a bare tree
    document = specification(ALL_ENDPOINTS, installed, is_open=is_open)
    return json.dumps(document, ensure_ascii=False).encode()


def _add_guards(
    app: Starlette, settings: Settings, state: AppState, doorkeeper: Doorkeeper, denials: Denials
) -> None:
    """Outermost first: headers on every answer, then what limits rates, the path, the host, the origin."""
    allowed = LOCAL_HOSTS if settings.auth == "open" else frozenset({"*"})
    if settings.auth == "open":
        app.add_middleware(SameOrigin, refuse=functools.partial(_refuse_origin, denials))
    app.add_middleware(TrustedHost, allowed=allowed, refuse=_refuse)
    app.add_middleware(CanonicalPath, refuse=_refuse)
    app.add_middleware(
        RateLimited, prefix=EXECUTIONS, state=state, identities=doorkeeper.identities, form=executions_form
    )
    app.add_middleware(SecurityHeaders)


async def _nothing_there(scope: Scope, receive: Receive, send: Send) -> None:
    answer = _refuse(scope, 404, "not_found", "there is nothing at this path")
    await answer(scope, receive, send)


def _refuse_origin(denials: Denials, scope: Scope, status: int, code: str, sentence: str) -> ASGIApp:
    """A page of somebody else is turned away before any route, and that is written down too."""
    address = scope["client"][0] if scope.get("client") else ""
    denials.note(Caller(actor=UNKNOWN, audience=Audience.ANYONE, address=address), None, None, status)
    return _refuse(scope, status, code, sentence)


def _refuse(scope: Scope, status: int, code: str, sentence: str) -> ASGIApp:
    """Errors before any route: in the form of the surface whose prefix the path has."""
    is_execution = scope["path"] == EXECUTIONS or scope["path"].startswith(f"{EXECUTIONS}/")
    form = executions_form if is_execution else build_server_form
    return form(Refusal(status, code, sentence))
