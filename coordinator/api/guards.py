"""What stands in front of every route: small ASGI layers for HTTP and WebSocket, and the reading of bodies.

They decide on what came over the wire (the raw path, the headers), never on a URL put together again from it,
and none of them looks at anything by which a caller could say that its request is another one than it is.

    UnreadableBody
        BodyTooLarge            more bytes than this endpoint takes
        BodyTooSlow             not all there in time
        ClientGone              nobody left to answer
        UnsupportedEncoding     compressed, or otherwise not as it is
        UnsupportedMediaType    not declared as JSON in UTF-8
"""

import asyncio
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv6Address
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Headers = Sequence[tuple[bytes, bytes]]
# (scope, status, code, sentence) -> the answer; each surface shapes its own errors.
Refuse = Callable[[Scope, int, str, str], ASGIApp]

LONGEST_MEDIA_TYPE = 256

_PATH_BYTES = re.compile(rb"/[A-Za-z0-9._~!$&'()*+,=:@%/-]*")
_ENCODED = re.compile(rb"%([0-9A-Fa-f]{2})?")
# Encoded, these only serve to look like something else to one of two readers.
_NEVER_ENCODED = frozenset(
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/\\;%\x7f"
) | set(range(0x20))
_HOST = re.compile(
    rb"(?:(?P<name>[a-z0-9](?:[a-z0-9._-]{0,252}[a-z0-9])?)|\[(?P<ipv6>[0-9a-f:.]{2,45})\])(?::(?P<port>[0-9]{1,5}))?"
)
_DEFAULT_PORTS = {"http": 80, "ws": 80, "https": 443, "wss": 443}
_GUARDED = ("http", "websocket")


class UnreadableBody(Exception):
    """The body of a request cannot be had."""


class BodyTooLarge(UnreadableBody):
    """More bytes than the endpoint takes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes")
        self.limit = limit


class BodyTooSlow(UnreadableBody):
    """The body was not complete in time."""


class ClientGone(UnreadableBody):
    """The client left before its body was complete."""


class UnsupportedEncoding(UnreadableBody):
    """The body is compressed, or encoded in another way."""


class UnsupportedMediaType(UnreadableBody):
    """The body is not declared to be JSON in UTF-8."""


@dataclass(frozen=True)
class Host:
    """Who a request says it wants to talk to; names in lower case, IPv6 addresses in brackets and short."""

    name: str
    port: int | None


class CanonicalPath:
    """Lets only paths through that every reader understands in the same way."""

    def __init__(self, app: ASGIApp, refuse: Refuse) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in _GUARDED:
            await self._app(scope, receive, send)
            return
        raw_path: bytes = scope.get("raw_path") or scope["path"].encode("utf-8", "surrogatepass")
        if not raw_path.startswith(b"/"):
            answer = self._refuse(scope, 400, "bad_request", "the request target must be a path")
        elif not is_canonical(raw_path, scope["path"]):
            answer = self._refuse(scope, 404, "not_found", "there is nothing at this path")
        else:
            answer = self._app
        await answer(scope, receive, send)


def is_canonical(raw_path: bytes, path: str) -> bool:
    """Whether a path is spelt in the one way that is ours and decodes to what routes and rules will see."""
    if _PATH_BYTES.fullmatch(raw_path) is None or b"//" in raw_path:
        return False
    if b"/." in raw_path and any(segment in (b".", b"..") for segment in raw_path.split(b"/")):
        return False
    if b"%" not in raw_path:
        return path == raw_path.decode("ascii")
    for escape in _ENCODED.finditer(raw_path):
        digits = escape.group(1)
        if digits is None or int(digits, 16) in _NEVER_ENCODED:
            return False
    try:
        return path == unquote_to_bytes(raw_path).decode("utf-8")
    except UnicodeDecodeError:
        return False


class TrustedHost:
    """Lets only requests through that ask for one of our own names; "*" allows every well-formed one.

    A page of somebody else whose name resolves to this machine sends its own name here.
    """

    def __init__(self, app: ASGIApp, allowed: frozenset[str], refuse: Refuse) -> None:
        self._app = app
        self._allowed = frozenset(name.lower() for name in allowed)
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in _GUARDED:
            await self._app(scope, receive, send)
            return
        host = requested_host(scope["headers"])
        if host is None:
            sentence = "a request needs exactly one well-formed Host header"
            answer = self._refuse(scope, 400, "bad_host", sentence)
        elif "*" not in self._allowed and host.name not in self._allowed:
            answer = self._refuse(scope, 400, "bad_host", "this server does not answer to that host name")
        else:
            answer = self._app
        await answer(scope, receive, send)


class SameOrigin:
    """Lets no page through but our own; what is not a browser sends no Origin and passes.

    Stands behind TrustedHost, which has made sure that the host compared with is ours.
    """

    def __init__(self, app: ASGIApp, refuse: Refuse) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in _GUARDED or is_same_origin(scope):
            await self._app(scope, receive, send)
            return
        answer = self._refuse(
            scope, 403, "foreign_origin", "a page of another origin may not call this server"
        )
        await answer(scope, receive, send)


def is_same_origin(scope: Scope) -> bool:
    """Whether a request comes from no page at all or from one that this server itself has served."""
    origins = _values(scope["headers"], b"origin")
    if not origins:
        return True
    if len(origins) > 1:
        return False
    scheme, separator, authority = origins[0].lower().decode("latin-1").partition("://")
    if not separator or scheme not in ("http", "https"):
        return False
    if scope.get("scheme") in ("https", "wss") and scheme != "https":
        return False
    origin = parse_host(authority.encode("latin-1"))
    host = requested_host(scope["headers"])
    if origin is None or host is None:
        return False
    # A proxy that ends TLS in front of us leaves "https" in the Origin alone, so its scheme gives both ports.
    default = _DEFAULT_PORTS[scheme]
    return (origin.name, origin.port or default) == (host.name, host.port or default)


def requested_host(headers: Headers) -> Host | None:
    """The host of the one Host header, or None when there is not exactly one, or none that makes sense."""
    values = _values(headers, b"host")
    return parse_host(values[0].lower()) if len(values) == 1 else None


@functools.lru_cache(maxsize=256)
def parse_host(text: bytes) -> Host | None:
    """A lower-case `name`, `name:port`, `address:port` or `[address]:port`; None for anything else."""
    found = _HOST.fullmatch(text)
    if found is None:
        return None
    port = int(found["port"]) if found["port"] is not None else None
    if port is not None and not 0 < port < 65536:
        return None
    if found["name"] is not None:
        return Host(found["name"].decode("ascii"), port) if b".." not in found["name"] else None
    try:
        return Host(f"[{IPv6Address(found['ipv6'].decode('ascii')).compressed}]", port)
    except AddressValueError:
        return None


class SecurityHeaders:
    """Adds to every answer what keeps a browser from doing more with it than showing it."""

    _DEFAULTS = (
        (b"x-content-type-options", b"nosniff"),
        (b"x-frame-options", b"DENY"),
        (b"referrer-policy", b"no-referrer"),
        (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
        (b"cache-control", b"no-store"),
    )
    _STARTS = ("http.response.start", "websocket.http.response.start")

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in _GUARDED:
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] in self._STARTS:
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                headers += [default for default in self._DEFAULTS if default[0] not in present]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_with_headers)


async def read_body(receive: Receive, headers: Headers, *, limit: int, deadline_s: float) -> bytes:
    """The whole body of a request, if it is not larger than the limit and complete before the deadline."""
    if any(
        value.strip().lower() not in (b"", b"identity") for value in _values(headers, b"content-encoding")
    ):
        raise UnsupportedEncoding("the body must not be compressed")
    for declared in _values(headers, b"content-length"):
        if len(declared) > 19 or (declared.isdigit() and int(declared) > limit):
            raise BodyTooLarge(limit)
    try:
        async with asyncio.timeout(deadline_s):
            return await _receive_all(receive, limit)
    except TimeoutError:
        raise BodyTooSlow(f"the body was not complete after {deadline_s:g} seconds") from None


async def _receive_all(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left before its body was complete")
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge(limit)
        if not message.get("more_body", False):
            return bytes(body)


def check_json_content_type(headers: Headers) -> None:
    """Refuse a body that is not declared to be JSON in UTF-8.

    A page of somebody else can send text/plain without asking, but not application/json.
    """
    values = _values(headers, b"content-type")
    if len(values) != 1:
        raise UnsupportedMediaType("a request with a body needs exactly one Content-Type header")
    if len(values[0]) > LONGEST_MEDIA_TYPE:
        raise UnsupportedMediaType("the Content-Type header is too long")
    media_type, *parameters = values[0].lower().decode("latin-1").split(";")
    if media_type.strip() != "application/json":
        raise UnsupportedMediaType("the body must be application/json")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "charset" and value.strip().strip('"') != "utf-8":
            raise UnsupportedMediaType("the body must be in UTF-8")


def _values(headers: Headers, name: bytes) -> list[bytes]:
    return [value for key, value in headers if key == name]
