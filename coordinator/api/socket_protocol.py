"""The server's side of a WebSocket connection, within bounds.

The library answers whatever comes for as long as it comes, keeps all fragments of a message however small
they are, and waits for ever for a peer that takes nothing, even to tell it that it is too slow.
"""

import logging
import re
import socket
from asyncio import TimerHandle
from asyncio.transports import BaseTransport
from collections.abc import Sequence
from typing import Any

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import InvalidState
from websockets.frames import Frame
from websockets.http11 import Request
from websockets.protocol import OPEN

from coordinator.api.text_frames import EXTENSION

LONGEST_LINE = 8000
_KEY = re.compile(rb"[A-Za-z0-9+/]{21}[AQgw]==")

# Nobody has anything to say but answers to pings.
MOST_FRAMES = 100
FRAMES_WINDOW_S = 10.0
KERNEL_BYTES = 128 * 1024
# After the last word: how long a peer may take to take it.
LINGER_S = 15.0
FLOOD_LINGER_S = 1.0

# The library tells of each connection with its query string, which may hold a ticket.
_quiet = logging.getLogger("uvicorn.error.websockets")
_quiet.setLevel(logging.WARNING)


def handshake_fault(target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> str | None:
    """What is wrong with the wish to open a WebSocket; the library would say it in a form of its own."""
    if not target.isascii():
        return "the request target must be ASCII"
    if max(len(target), *(len(name) + len(value) for name, value in headers)) > LONGEST_LINE:
        return f"a line of a WebSocket handshake may have {LONGEST_LINE} bytes"
    values = {name: [value for other, value in headers if other == name] for name, _ in headers}
    if values.get(b"sec-websocket-version") != [b"13"]:
        return "a WebSocket of version 13 is spoken here: Sec-WebSocket-Version must be 13"
    keys = values.get(b"sec-websocket-key", [])
    if len(keys) != 1 or _KEY.fullmatch(keys[0]) is None:
        return "a WebSocket handshake needs exactly one Sec-WebSocket-Key: 16 bytes in base64"
    return None


class BoundedSocket(WebSocketsSansIOProtocol):
    """The library's WebSocket for a peer that need not be well-meaning."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _quiet
        self._frame_count = 0
        self._window_ends = 0.0
        self._is_flooded = False
        self._linger: TimerHandle | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        line = transport.get_extra_info("socket")
        if line is not None:
            # what a peer does not take waits here, in the kernel's memory
            line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._linger is not None:
            self._linger.cancel()
        super().connection_lost(exc)

    def handle_connect(self, event: Request) -> None:
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["extensions"][EXTENSION] = {}

    def data_received(self, data: bytes) -> None:
        if not self._is_flooded:
            super().data_received(data)

    # What comes

    def handle_cont(self, event: Frame) -> None:
        if self._may_come(event):
            super().handle_cont(event)

    def handle_text(self, event: Frame) -> None:
        if self._may_come(event):
            super().handle_text(event)

    def handle_bytes(self, event: Frame) -> None:
        if self._may_come(event):
            super().handle_bytes(event)

    def handle_ping(self) -> None:
        answers = self.conn.data_to_send()
        if self._may_come() and self.writable.is_set():
            self.transport.write(b"".join(answers))

    def handle_pong(self, event: Frame) -> None:
        if self._may_come(event):
            super().handle_pong(event)

    def _may_come(self, _event: Frame | None = None) -> bool:
        """Count a frame; False for one that comes after the end, which too many of them are."""
        now = self.loop.time()
        if now >= self._window_ends:
            self._frame_count, self._window_ends = 0, now + FRAMES_WINDOW_S
        self._frame_count += 1
        if self._frame_count > MOST_FRAMES and not self._is_flooded:
            self._is_flooded = True  # the rest is thrown away unread, so that the last word gets through
            self._end(1008, "too many frames")
            self.loop.call_later(FLOOD_LINGER_S, self.transport.close)
        return not self.close_sent

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": 1011})
        self._let_linger()

    # The end

    async def run_asgi(self) -> None:
        await super().run_asgi()
        self._let_linger()

    async def send(self, message: Any) -> None:
        if message["type"] == "websocket.send" and "frames" in message:
            await self._send_frames(message["frames"])
        elif message["type"] == "websocket.close" and self.handshake_complete:
            self._end(message.get("code", 1000), message.get("reason") or "")
        else:
            await super().send(message)

    async def _send_frames(self, frames: bytes) -> None:
        await self.writable.wait()
        if self.disconnected or self.close_sent or self.conn.state is not OPEN:
            raise ClientDisconnected
        self.transport.write(frames)

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except InvalidState:
            self.transport.close()  # the peer was quicker
        self._let_linger()

    def _end(self, code: int, reason: str) -> None:
        """Say why and wait for the answer; unlike the library's, this waits for nothing before."""
        if self.close_sent or self.transport.is_closing():
            return
        self.queue.put_nowait({"type": "websocket.disconnect", "code": code, "reason": reason})
        try:
            self.conn.send_close(code, reason)
        except InvalidState:
            self.transport.close()
            return
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        self.stop_keepalive()
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(self.close_timeout, self.transport.close)
        self._let_linger()

    def _let_linger(self) -> None:
        """Cut a peer that does not take the last words."""
        if self._linger is None and not self.disconnected:
            self._linger = self.loop.call_later(LINGER_S, self.transport.abort)
