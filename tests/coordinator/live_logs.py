"""A coordinator behind a socket, and followers of logs: what the tests of WebSockets stand on."""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.types import ASGIApp, Receive, Scope, Send
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from coordinator.api.auth import Doorkeeper
from coordinator.api.denials import Denials
from coordinator.api.dispatch import Application, TreeRouter
from coordinator.api.executions.stream_routes import SOCKETS
from coordinator.api.server import make_server
from coordinator.api.websockets import Patience, sockets_of

TIME_LIMIT_S = 20.0


def impatient(app: Starlette, patience: Patience, **more: Any) -> Starlette:
    """The WebSockets of an application alone, with another patience and other limits."""
    state = app.state.coordinator
    sockets = [replace(one, patience=patience, **more) for one in SOCKETS]
    apps = sockets_of(sockets, state, Doorkeeper(state), Denials(state))
    return Application(TreeRouter([], default=app, lifespan=None, sockets=apps))


@contextmanager
def served(app: ASGIApp) -> Iterator["Served"]:
    """The application on a port of its own, without the chores that it does in the background."""

    async def without_chores(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await app(scope, receive, send)
            return
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = make_server(without_chores, host="127.0.0.1", port=0, fd=listener.fileno())
        thread = threading.Thread(target=server.run, name="coordinator", daemon=True)
        thread.start()

        def stop() -> None:
            server.should_exit = True
            thread.join(TIME_LIMIT_S)

        try:
            with ExitStack() as opened:
                yield Served(listener.getsockname()[1], stop, opened)
        finally:
            stop()


@dataclass(frozen=True)
class Refused:
    """An HTTP answer in place of a WebSocket."""

    status: int
    body: dict[str, Any]


class Served:
    """Where it listens, and how it is stopped before the test ends."""

    def __init__(self, port: int, stop: Callable[[], None], opened: ExitStack) -> None:
        self.port = port
        self.stop = stop
        self._opened = opened

    def path(self, build_id: str, **query: str) -> str:
        asked = f"?{urlencode(query)}" if query else ""
        return f"/api/v1/builds/{build_id}/logs/stream{asked}"

    def open(
        self,
        build_id: str,
        headers: dict[str, str] | None = None,
        *,
        offers: Sequence[str] = (),
        origin: str | None = None,
        path: str | None = None,
        takes_little: bool = False,
        **query: str,
    ) -> "Follower":
        """Follow a build; `from_` is written `from`. `takes_little`: only what is asked for is taken."""
        asked = {name.rstrip("_"): value for name, value in query.items()}
        opening = connect(
            f"ws://127.0.0.1:{self.port}{path or self.path(build_id, **asked)}",
            additional_headers=headers or {},
            subprotocols=[*offers] or None,  # type: ignore[arg-type]
            origin=origin,  # type: ignore[arg-type]
            compression=None,
            proxy=None,
            open_timeout=TIME_LIMIT_S,
            close_timeout=2,
            ping_interval=None,
            max_queue=1 if takes_little else 16,
            sock=self._small_socket() if takes_little else None,
            max_size=None,
        )
        return Follower(self._opened.enter_context(opening))

    def _small_socket(self) -> socket.socket:
        line = socket.socket()
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", self.port))
        return line

    def refusal(self, build_id: str, headers: dict[str, str] | None = None, **wish: Any) -> Refused:
        """How following is refused."""
        try:
            self.open(build_id, headers, **wish).close()
        except InvalidStatus as error:
            return Refused(error.response.status_code, json.loads(error.response.body or b"{}"))
        raise AssertionError("it was not refused")

    def raw(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=TIME_LIMIT_S)


class Follower:
    """One open WebSocket."""

    def __init__(self, line: ClientConnection) -> None:
        self.line = line

    def next(self) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(self.line.recv(timeout=TIME_LIMIT_S))
        return told

    def take(self, count: int) -> list[str]:
        """The texts of the next so many messages."""
        return [self.next()["message"] for _ in range(count)]

    def rest(self) -> tuple[list[dict[str, Any]], int]:
        """Everything until it is closed, and the code of that."""
        found: list[dict[str, Any]] = []
        while True:
            try:
                found.append(self.next())
            except ConnectionClosed as closed:
                return found, closed.rcvd.code if closed.rcvd is not None else 1006

    def close(self) -> None:
        self.line.close()
