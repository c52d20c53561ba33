"""A fast HTTP/1.1 client: one kept connection, one request at a time, no library between it and the socket.

A measurement's client shares the processor with what it measures, so it has to cost next to nothing.
"""

import socket
from dataclasses import dataclass

TIMEOUT_S = 60.0


class BadAnswer(Exception):
    """The other side answered what this client cannot go on with."""


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes


class Line:
    """One connection to one coordinator."""

    def __init__(self, host: str, port: int, token: str = "") -> None:
        self._socket = socket.create_connection((host, port), timeout=TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        authorization = f"Authorization: Bearer {token}\r\n" if token else ""
        self._head = f"Host: {host}:{port}\r\n{authorization}".encode()
        self._buffer = b""

    def close(self) -> None:
        self._socket.close()

    def post(self, path: str, body: bytes, headers: str = "") -> Reply:
        """Send a body of JSON and wait for the whole answer."""
        self._socket.sendall(
            b"POST %s HTTP/1.1\r\n%bContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b"
            % (path.encode(), self._head, headers.encode(), len(body), body)
        )
        return self._read()

    def get(self, path: str) -> Reply:
        self._socket.sendall(b"GET %s HTTP/1.1\r\n%b\r\n" % (path.encode(), self._head))
        return self._read()

    def _read(self) -> Reply:
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            self._receive()
        head = self._buffer[:end].lower()
        status = int(head[9:12])
        length = _content_length(head) if status != 204 else 0
        whole = end + 4 + length
        while len(self._buffer) < whole:
            self._receive()
        body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
        return Reply(status, body)

    def _receive(self) -> None:
        data = self._socket.recv(256 * 1024)
        if not data:
            raise BadAnswer("the connection was closed in the middle of an answer")
        self._buffer += data


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    raise BadAnswer(f"an answer without a length: {head[:200]!r}")
