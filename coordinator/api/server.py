"""Starts the HTTP server, and puts limits on how slowly and how much a connection may speak.

The server library waits for a request for as long as it takes, and forgets its keep-alive timer at the first
byte, so a few thousand sockets that send a byte now and then would hold it for ever. No ASGI layer can help,
as none runs before the head of a request is complete; hence a protocol class of our own.
"""

import asyncio
import enum
import json
import resource
import socket
from asyncio import TimerHandle
from collections.abc import Callable
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from coordinator.api.socket_protocol import BoundedSocket, handshake_fault

# Descriptors that stay free for the database, logs and files when as many sockets are open as may be.
RESERVED_DESCRIPTORS = 256


@dataclass(frozen=True)
class Limits:
    """What one connection may take of our time and memory."""

    header_deadline_s: float = 10.0
    # After an answer that came before the whole body: how long the rest is read and thrown away, so that a
    # client that only reads when it has sent everything gets to see the answer.
    drain_s: float = 2.0
    # A client that takes no byte of an answer for so long is gone.
    write_stall_s: float = 60.0
    head_bytes: int = 64 * 1024
    target_bytes: int = 16 * 1024
    headers: int = 100
    pipelined: int = 64
    connections: int = 10_000


class _Stage(enum.Enum):
    """How far the request is that a connection is reading."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    ENDED = enum.auto()  # nothing more is read


class RefusedRequest(Exception):
    """A request that is not passed on; raised through the parser, which then stops."""


class BoundedProtocol(HttpToolsProtocol):
    """The library's HTTP/1.1 with deadlines, with limits, and with one reading only of what is sent."""

    limits = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage = _Stage.IDLE
        self._deadline: TimerHandle | None = None
        self._stalled: TimerHandle | None = None
        self._refusal = (400, "this is not an HTTP/1.1 request")
        self._running: RequestResponseCycle | None = None
        self._messages = 0
        self._waiting_bytes = 0
        self._header_count = 0
        self._header_bytes = 0

    # The connection.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= self.limits.connections:
            self._stage = _Stage.ENDED
            self.transport = transport
            transport.close()
            return
        super().connection_made(transport)
        self._start_deadline(self.limits.header_deadline_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stage = _Stage.ENDED
        self._stop_timers()
        if self._running is not None:
            # The library tells the newest request only; this one may be waiting for exactly that.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._stage is _Stage.ENDED:
            return
        self._unset_keepalive_if_required()
        if self._stage is _Stage.IDLE:
            self._start_deadline(self.limits.header_deadline_s)
        messages, was_body = self._messages, self._stage is _Stage.BODY
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse(*self._refusal)
        else:
            if not was_body and messages == self._messages and self._stage in (_Stage.IDLE, _Stage.HEAD):
                self._count_waiting(len(data))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._stop_watching()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    # What the parser reports.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._unset_keepalive_if_required()
        self._start_deadline(self.limits.header_deadline_s)
        self._stage = _Stage.HEAD
        self._messages += 1
        self._waiting_bytes = self._header_count = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.target_bytes:
            self._stop_parsing(414, f"the request target is longer than {self.limits.target_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_count += 1
        self._header_bytes += len(name) + len(value) + 4
        if self._header_count > self.limits.headers:
            self._stop_parsing(431, f"the request has more than {self.limits.headers} headers")
        if self._header_bytes > self.limits.head_bytes:
            self._stop_parsing(431, f"the headers are longer than {self.limits.head_bytes} bytes")
        # A trailer comes when the request is already being answered, and must not change its headers by then.
        if self._stage is _Stage.HEAD:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_head()
        # An offer to upgrade that is not taken is read once more without it, and answered only then.
        if self._should_upgrade() or not self.parser.should_upgrade():
            super().on_headers_complete()
        self._stop_deadline()
        self._stage = _Stage.BODY

    def on_body(self, body: bytes) -> None:
        if not self.parser.should_upgrade():
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._stage = _Stage.IDLE
        if self.parser.should_upgrade():
            return
        if self.cycle.response_complete:
            # The rest of a body whose answer has long been sent: from here on the connection is idle.
            self._stop_deadline()
            self._start_keep_alive()
        super().on_message_complete()

    # What the application does.

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        nothing_queued = not self.pipeline
        super().on_response_complete()
        if self.transport.is_closing() or (self._stage is _Stage.ENDED and nothing_queued):
            self._close()
        elif self._stage is _Stage.BODY and not self._is_answering():
            self._unset_keepalive_if_required()
            self._start_deadline(self.limits.drain_s)

    # Decisions.

    def _check_head(self) -> None:
        """Refuse what another HTTP reader on the way here could have taken for something else."""
        names = [name for name, _ in self.headers]
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._stop_parsing(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
        if not self.url.startswith(b"/") or b"#" in self.url:
            self._stop_parsing(400, "the request target must be a path")
        if b"transfer-encoding" in names:
            codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
            if codings != [b"chunked"] or b"content-length" in names or version == "1.0":
                self._stop_parsing(400, "the length of the body is given in more than one way")
        if names.count(b"content-length") > 1:
            self._stop_parsing(400, "the length of the body is given more than once")
        if len(self.pipeline) >= self.limits.pipelined:
            self._stop_parsing(400, "too many requests are sent ahead of their answers")

    def _stop_parsing(self, status: int, sentence: str) -> None:
        self._refusal = (status, sentence)
        raise RefusedRequest(sentence)

    def _count_waiting(self, received: int) -> None:
        """Bound what comes in without ever completing a head: one endless header, or only empty lines."""
        self._waiting_bytes += received
        if self._waiting_bytes > self.limits.head_bytes:
            self._refuse(431, f"the headers are longer than {self.limits.head_bytes} bytes")

    def _upgrade(self, rest: bytes) -> None:
        if not self._should_upgrade():
            self._answer_without_upgrade(rest)
        elif self._is_answering():
            self._refuse(400, "an upgrade must wait for the answers before it")
        elif self.scope["method"] != "GET" or self._announces_body():
            self._refuse(400, "an upgrade must be a GET without a body")
        elif (fault := handshake_fault(self.url, self.headers)) is not None:
            self._refuse(400, fault)
        else:
            self._stop_timers()
            self._stage = _Stage.ENDED
            self.handle_websocket_upgrade()

    def _answer_without_upgrade(self, rest: bytes) -> None:
        """Read a request again as if it had not offered another protocol.

        Some clients offer HTTP/2 with every request; the parser takes the body of such a request for the
        other protocol already, and would take what comes later of it for the next request.
        """
        version = self.parser.get_http_version().encode()
        head = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        head += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join([*head, b"", rest]))

    def _announces_body(self) -> bool:
        return any(
            name == b"transfer-encoding" or (name == b"content-length" and value.strip(b"0"))
            for name, value in self.headers
        )

    def _is_answering(self) -> bool:
        # The newest request is the last to be answered.
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, status: int, sentence: str) -> None:
        """Read no further; say why if that cannot be taken for the answer to an earlier request."""
        body_is_broken = self._stage is _Stage.BODY
        self._stage = _Stage.ENDED
        self._stop_deadline()
        if not self._is_answering():
            self._write_refusal(status, sentence)
            self._close()
        elif not body_is_broken:
            return  # on_response_complete closes after the last answer
        elif self.pipeline:
            self.pipeline.popleft()  # it waits behind others and will never be whole
        else:
            if not self.cycle.response_started:
                self._write_refusal(status, sentence)
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            self._close()

    def _write_refusal(self, status: int, sentence: str) -> None:
        code = _CODES.get(status, "bad_request")
        body = json.dumps({"error": sentence, "code": code, "details": []}).encode()
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}".encode()]
        lines += [name + b": " + value for name, value in self.server_state.default_headers]
        lines += [
            b"content-type: application/json",
            b"content-length: %d" % len(body),
            b"connection: close",
            b"",
            body,
        ]
        self.transport.write(b"\r\n".join(lines))

    def _close(self) -> None:
        """Close as soon as the client has taken what is written, or has stopped taking it."""
        self._stage = _Stage.ENDED
        self._stop_deadline()
        self.transport.close()
        if self.transport.get_write_buffer_size() > 0:
            self._watch_writing()

    # Timers.

    def _start_deadline(self, seconds: float) -> None:
        """Cut the connection after this time, unless it is being watched already."""
        if self._deadline is None:
            self._deadline = self.loop.call_later(seconds, self._deadline_passed)

    def _deadline_passed(self) -> None:
        self._deadline = None
        if self._stage is _Stage.HEAD:
            self._refuse(408, "the headers of the request took too long")
        elif self._is_answering():
            self._stage = _Stage.ENDED  # on_response_complete closes after the last answer
        else:
            self._close()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _start_keep_alive(self) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def _watch_writing(self) -> None:
        if self._stalled is None:
            self._look_after(self.transport.get_write_buffer_size())

    def _look_after(self, waiting: int) -> None:
        self._stalled = self.loop.call_later(self.limits.write_stall_s, self._look_at_writing, waiting)

    def _look_at_writing(self, waiting_before: int) -> None:
        """Cut a client that has taken nothing since the last look."""
        waiting = self.transport.get_write_buffer_size()
        if waiting >= waiting_before:
            self._stalled = None
            self.transport.abort()
        else:
            self._look_after(waiting)

    def _stop_watching(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _stop_timers(self) -> None:
        self._stop_deadline()
        self._stop_watching()
        self._unset_keepalive_if_required()


_CODES = {408: "too_slow", 414: "target_too_long", 431: "headers_too_large", 505: "version_not_supported"}


class _Server(uvicorn.Server):
    """Tells those who wait for something that it will not come, before it waits for them."""

    def __init__(self, config: uvicorn.Config, before_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self._before_shutdown = before_shutdown

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._before_shutdown()
        await super().shutdown(sockets)


def make_server(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    fd: int | None = None,
    header_deadline_s: float = 10.0,
    timeout_keep_alive: int = 30,
    log_level: str | int = "warning",
    limits: Limits | None = None,
    before_shutdown: Callable[[], None] = lambda: None,
) -> uvicorn.Server:
    """A server for this application on an address, or on a listening socket when its descriptor is given."""
    chosen = replace(limits or Limits(), header_deadline_s=header_deadline_s)
    chosen = replace(chosen, connections=min(chosen.connections, _affordable_connections()))

    class Protocol(BoundedProtocol):
        limits = chosen

    return _Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            fd=fd,
            loop="uvloop",
            http=Protocol,
            ws=BoundedSocket,
            ws_max_size=64 * 1024,
            ws_per_message_deflate=False,
            lifespan="on",
            log_config=None,
            log_level=log_level,
            access_log=False,
            proxy_headers=False,  # who calls is what the socket says, not what a header says
            server_header=False,
            date_header=True,
            limit_concurrency=None,
            backlog=2048,
            timeout_keep_alive=timeout_keep_alive,
            timeout_graceful_shutdown=5,
        ),
        before_shutdown,
    )


def _affordable_connections() -> int:
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft_limit == resource.RLIM_INFINITY:
        return Limits.connections
    return max(soft_limit - RESERVED_DESCRIPTORS, soft_limit // 2)
