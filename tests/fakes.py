"""Stand-ins for what lies outside of the programs: the clock on the wall and the network between the two."""

import asyncio
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import unquote

import httpx
from anyio.from_thread import BlockingPortal
from starlette.types import ASGIApp, Message

MORNING = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)


class SettableClock:
    """Stands still until it is moved."""

    def __init__(self, now: datetime = MORNING) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now


class InProcess(httpx.BaseTransport):
    """Carries requests into an ASGI application without a socket; may fail as a network does.

    `is_unplugged`: nothing arrives. `lose_answers`: so many requests have their effect and no answer.
    `repeat`: so many requests arrive twice, and the second answer is the one that is seen.
    """

    def __init__(self, app: ASGIApp, portal: BlockingPortal) -> None:
        self._app = app
        self._portal = portal
        self._lock = threading.Lock()
        self.is_unplugged = False
        self.lose_answers = 0
        self.repeat = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if self.is_unplugged:
            raise httpx.ConnectError("unplugged", request=request)
        body = request.read()
        if self._takes("repeat"):
            self._portal.call(self._carry, request, body)
        status, headers, content = self._portal.call(self._carry, request, body)
        if self._takes("lose_answers"):
            raise httpx.ReadError("the answer was lost", request=request)
        return httpx.Response(status, headers=headers, content=content, request=request)

    def _takes(self, fault: str) -> bool:
        with self._lock:
            left: int = getattr(self, fault)
            setattr(self, fault, max(0, left - 1))
            return left > 0

    async def _carry(self, request: httpx.Request, body: bytes) -> tuple[int, list[Any], bytes]:
        return await carry(self._app, scope_of(request), body)


def scope_of(request: httpx.Request) -> dict[str, Any]:
    """The ASGI scope of an HTTP request."""
    raw_path, _, query = request.url.raw_path.partition(b"?")
    return a_scope(
        request.method,
        raw_path,
        query=query,
        headers=[(name.lower(), value) for name, value in request.headers.raw],
    )


def a_scope(
    method: str, raw_path: bytes, *, query: bytes = b"", headers: list[tuple[bytes, bytes]]
) -> dict[str, Any]:
    """An ASGI scope as a server makes it out of exactly these bytes."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": unquote(raw_path.decode("latin-1")),
        "raw_path": raw_path,
        "query_string": query,
        "headers": headers,
        "client": ("127.0.0.1", 50000),
        "server": ("127.0.0.1", 3000),
        "root_path": "",
        "state": {},
    }


async def carry(
    app: ASGIApp, scope: dict[str, Any], body: bytes, *, seen: Callable[[bytes], None] | None = None
) -> tuple[int, list[Any], bytes]:
    """One request and its whole answer: status, headers, bytes. `seen` hears each piece as it comes."""
    asked = [{"type": "http.request", "body": body, "more_body": False}]
    said: list[Message] = []
    finished = asyncio.Event()

    async def receive() -> Message:
        if asked:
            return asked.pop()
        await finished.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        said.append(message)
        if message["type"] == "http.response.body":
            if seen is not None:
                seen(message.get("body", b""))
            if not message.get("more_body", False):
                finished.set()

    await app(scope, receive, send)
    start = said[0]
    content = b"".join(message.get("body", b"") for message in said[1:])
    return start["status"], list(start["headers"]), content
