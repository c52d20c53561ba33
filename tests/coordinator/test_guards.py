"""What passes the layers in front of the routes, and what does not."""

import asyncio
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.api.guards import (
    BodyTooLarge,
    BodyTooSlow,
    CanonicalPath,
    ClientGone,
    SameOrigin,
    SecurityHeaders,
    TrustedHost,
    UnsupportedEncoding,
    UnsupportedMediaType,
    check_json_content_type,
    read_body,
)

LOCAL = frozenset({"localhost", "127.0.0.1", "[::1]"})


def refuse(scope: Scope, status: int, code: str, sentence: str) -> Response:
    return JSONResponse({"error": sentence, "code": code}, status_code=status)


class Route:
    """Stands behind the guards and remembers what reached it."""

    def __init__(self) -> None:
        self.reached: list[Scope] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.reached.append(scope)
        await PlainTextResponse("reached")(scope, receive, send)


def a_scope(
    path: bytes = b"/",
    /,
    *headers: tuple[bytes, bytes],
    kind: str = "http",
    scheme: str = "http",
    **more: Any,
) -> Scope:
    scope = {
        "type": kind,
        "method": "GET",
        "scheme": scheme,
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": b"",
        "headers": list(headers),
    }
    return scope | more


async def messages_for(app: ASGIApp, scope: Scope) -> list[Message]:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


async def status_of(app: ASGIApp, scope: Scope) -> int:
    status: int = (await messages_for(app, scope))[0]["status"]
    return status


@pytest.mark.threat("A16")
@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "path",
    [
        b"//api/v1/builds",
        b"/api//v1",
        b"/api/v1//",
        b"/api/v1/..;/admin",
        b"/api/..;x/admin",
        b"/api/../admin",
        b"/..",
        b"/.",
        b"/api/./v1",
        b"/api/%2e%2e/admin",
        b"/api/%2E%2E/admin",
        b"/api/.%2e/admin",
        b"/api/%2e/v1",
        b"/static/..%2f..%2fetc",
        b"/api%2fv1",
        b"/api%2Fv1",
        b"/api%5cv1",
        b"/api\\v1",
        b"/\\..\\x",
        b"/api/v1;x=.js",
        b"/api/v1%3bx=.js",
        b"/api/v1%00",
        b"/api/v1%0a",
        b"/api/v1%7f",
        b"/api/v1\x00",
        b"/api/v1\x1b[31m",
        b"/api/%ff",
        b"/api/%c0%ae%c0%ae/",
        b"/api/%ed%a0%80",
        b"/api/%",
        b"/api/%4",
        b"/api/%zz",
        b"/api/%u002e",
        b"/api/%252e%252e/",
        b"/%61pi/v1",
        b"/api/\xc3\xa9",
        b"/api /v1",
    ],
)
async def test_a_path_that_can_be_read_in_two_ways_is_not_found(path: bytes, kind: str) -> None:
    route = Route()

    messages = await messages_for(CanonicalPath(route, refuse), a_scope(path, kind=kind))

    assert messages[0]["status"] == 404
    assert messages[0]["type"] == (
        "http.response.start" if kind == "http" else "websocket.http.response.start"
    )
    assert route.reached == []


@pytest.mark.threat("A16")
@pytest.mark.parametrize(
    "path",
    [
        b"/",
        b"/api/v1/builds",
        b"/API/V1",
        b"/api/v1/",
        b"/a/...",
        b"/a/.well-known",
        b"/a/b..c",
        b"/a/%C3%A9",
        b"/a/x%20y",
    ],
)
async def test_a_canonical_path_passes_as_it_is(path: bytes) -> None:
    route, scope = Route(), a_scope(path)

    assert await status_of(CanonicalPath(route, refuse), scope) == 200

    assert route.reached == [scope]


@pytest.mark.threat("A16")
@pytest.mark.parametrize("raw_path", [b"/public", b"/caf%C3%A9"])
async def test_a_path_decoded_otherwise_than_we_would_is_not_found(raw_path: bytes) -> None:
    scope = a_scope(raw_path, path="/admin")

    assert await status_of(CanonicalPath(Route(), refuse), scope) == 404


async def test_without_the_raw_path_the_decoded_one_is_judged() -> None:
    app = CanonicalPath(Route(), refuse)

    assert await status_of(app, a_scope(raw_path=None, path="/api/v1")) == 200
    assert await status_of(app, a_scope(raw_path=None, path="/api/../v1")) == 404
    assert await status_of(app, a_scope(raw_path=None, path="/\ud800")) == 404


@pytest.mark.threat("A17")
@pytest.mark.parametrize("target", [b"http://evil/x", b"*", b"@google.com", b"evil:80", b"api"])
async def test_a_target_that_is_no_path_is_a_bad_request(target: bytes) -> None:
    route = Route()

    assert await status_of(CanonicalPath(route, refuse), a_scope(target)) == 400

    assert route.reached == []


@pytest.mark.threat("A17")
@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("allowed", [LOCAL, frozenset({"*"})])
@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [b""],
        [b"localhost", b"localhost"],
        [b"localhost", b"evil"],
        [b"evil/%2f..admin?"],
        [b"localhost/admin"],
        [b"localhost?x"],
        [b"localhost#x"],
        [b"user@localhost"],
        [b"localhost@evil"],
        [b"localhost:"],
        [b"localhost:0"],
        [b"localhost:65536"],
        [b"localhost:80:80"],
        [b"localhost:8x"],
        [b"localhost evil"],
        [b"localhost,evil"],
        [b"localhost\\evil"],
        [b"localhost."],
        [b".localhost"],
        [b"local..host"],
        [b"::1"],
        [b"[::1"],
        [b"[::1]x"],
        [b"[:::1]"],
        [b"[1.2.3.4]"],
        [b"[::1%25lo]"],
        [b"l\xf6calhost"],
        [b"x" * 300],
    ],
)
async def test_a_host_that_makes_no_sense_is_a_bad_request(
    hosts: list[bytes], allowed: frozenset[str], kind: str
) -> None:
    route = Route()
    scope = a_scope(b"/", *[(b"host", host) for host in hosts], kind=kind)

    assert await status_of(TrustedHost(route, allowed, refuse), scope) == 400

    assert route.reached == []


@pytest.mark.threat("A17")
@pytest.mark.parametrize(
    "host", [b"evil.example", b"localhost.evil.example", b"127.0.0.2", b"[::2]", b"evil:3000", b"0"]
)
async def test_a_host_of_somebody_else_is_refused_unless_every_host_is_allowed(host: bytes) -> None:
    scope = a_scope(b"/", (b"host", host))

    assert await status_of(TrustedHost(Route(), LOCAL, refuse), scope) == 400
    assert await status_of(TrustedHost(Route(), frozenset({"*"}), refuse), scope) == 200


@pytest.mark.parametrize(
    "host",
    [b"localhost", b"LocalHost:3000", b"127.0.0.1:1", b"[::1]", b"[::1]:65535", b"[0:0:0:0:0:0:0:1]:80"],
)
async def test_our_own_host_passes(host: bytes) -> None:
    assert await status_of(TrustedHost(Route(), LOCAL, refuse), a_scope(b"/", (b"host", host))) == 200


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize(
    "origins",
    [
        [b"null"],
        [b""],
        [b"http://evil.example"],
        [b"http://localhost"],
        [b"http://localhost:3001"],
        [b"https://localhost:3001"],
        [b"http://localhost:3000.evil.example"],
        [b"http://evil.example@localhost:3000"],
        [b"http://localhost:3000/"],
        [b"file://localhost:3000"],
        [b"localhost:3000"],
        [b"http://127.0.0.1:3000"],
        [b"http://localhost:3000", b"http://localhost:3000"],
        [b"http://localhost:3000 http://evil.example"],
        [b"*"],
        [b"http://l\xf6calhost:3000"],
    ],
)
async def test_a_page_of_another_origin_is_refused(origins: list[bytes], kind: str) -> None:
    route = Route()
    scope = a_scope(
        b"/", (b"host", b"localhost:3000"), *[(b"origin", origin) for origin in origins], kind=kind
    )

    assert await status_of(SameOrigin(route, refuse), scope) == 403

    assert route.reached == []


@pytest.mark.parametrize(
    ("host", "origin", "scheme"),
    [
        (b"localhost:3000", None, "http"),
        (b"localhost:3000", b"http://localhost:3000", "http"),
        (b"LOCALHOST:3000", b"HTTP://localhost:3000", "http"),
        (b"[::1]:3000", b"http://[::1]:3000", "ws"),
        (b"localhost", b"http://localhost:80", "http"),
        (b"ci.example", b"https://ci.example", "https"),
        (b"ci.example", b"https://ci.example", "http"),  # behind a proxy that ends TLS
        (b"ci.example", b"https://ci.example", "wss"),
    ],
)
async def test_our_own_page_and_programs_pass(host: bytes, origin: bytes | None, scheme: str) -> None:
    headers = [(b"host", host)] + ([(b"origin", origin)] if origin else [])

    assert await status_of(SameOrigin(Route(), refuse), a_scope(b"/", *headers, scheme=scheme)) == 200


async def test_an_unencrypted_page_may_not_call_an_encrypted_server() -> None:
    scope = a_scope(
        b"/", (b"host", b"ci.example:8443"), (b"origin", b"http://ci.example:8443"), scheme="https"
    )

    assert await status_of(SameOrigin(Route(), refuse), scope) == 403


@pytest.mark.threat("A18")
@pytest.mark.parametrize("name", [b"x-http-method-override", b"x-http-method", b"x-method-override"])
async def test_a_header_cannot_change_the_method_the_path_or_the_host(name: bytes) -> None:
    route = Route()
    guarded = CanonicalPath(TrustedHost(SameOrigin(SecurityHeaders(route), refuse), LOCAL, refuse), refuse)
    scope = a_scope(
        b"/api",
        (b"host", b"localhost"),
        (name, b"DELETE"),
        (b"x-original-url", b"/admin"),
        (b"x-rewrite-url", b"/admin"),
        (b"x-forwarded-host", b"evil.example"),
        query_string=b"_method=DELETE",
    )

    assert await status_of(guarded, scope) == 200

    assert route.reached[0]["method"] == "GET"
    assert route.reached[0]["path"] == "/api"


@pytest.mark.threat("A17")
async def test_a_forwarded_host_does_not_replace_the_host() -> None:
    scope = a_scope(b"/", (b"host", b"evil.example"), (b"x-forwarded-host", b"localhost"))

    assert await status_of(TrustedHost(Route(), LOCAL, refuse), scope) == 400


@pytest.mark.parametrize(
    "guard",
    [
        lambda app: CanonicalPath(app, refuse),
        lambda app: TrustedHost(app, LOCAL, refuse),
        lambda app: SameOrigin(app, refuse),
        lambda app: SecurityHeaders(app),
    ],
)
async def test_the_start_and_end_of_the_server_pass_every_guard(guard: Any) -> None:
    reached: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(scope["type"])

    await messages_for(guard(app), {"type": "lifespan"})

    assert reached == ["lifespan"]


async def test_every_answer_carries_the_security_headers_once() -> None:
    start = (await messages_for(SecurityHeaders(Route()), a_scope()))[0]

    names = [name for name, _ in start["headers"]]
    headers = dict(start["headers"])
    assert len(names) == len(set(names))
    assert headers[b"x-content-type-options"] == b"nosniff"
    assert headers[b"x-frame-options"] == b"DENY"
    assert headers[b"referrer-policy"] == b"no-referrer"
    assert headers[b"content-security-policy"] == b"default-src 'none'; frame-ancestors 'none'"
    assert headers[b"cache-control"] == b"no-store"


async def test_a_route_may_set_its_own_policy_and_caching() -> None:
    page = PlainTextResponse(
        "page", headers={"Content-Security-Policy": "default-src 'self'", "Cache-Control": "max-age=60"}
    )

    start = (await messages_for(SecurityHeaders(page), a_scope()))[0]

    assert [value for name, value in start["headers"] if name == b"content-security-policy"] == [
        b"default-src 'self'"
    ]
    assert [value for name, value in start["headers"] if name == b"cache-control"] == [b"max-age=60"]
    assert (b"x-content-type-options", b"nosniff") in start["headers"]


async def test_a_refused_websocket_carries_the_security_headers_too() -> None:
    guarded = SecurityHeaders(SameOrigin(Route(), refuse))

    start = (await messages_for(guarded, a_scope(b"/", (b"origin", b"null"), kind="websocket")))[0]

    assert (b"x-frame-options", b"DENY") in start["headers"]


class Client:
    """Sends a body in pieces, and counts how many of them were asked for."""

    def __init__(self, *pieces: bytes, leaves: bool = False, stalls: bool = False) -> None:
        self._messages: list[Message] = [
            {"type": "http.request", "body": piece, "more_body": True} for piece in pieces
        ]
        if leaves:
            self._messages.append({"type": "http.disconnect"})
        elif not stalls:
            self._messages.append({"type": "http.request", "body": b"", "more_body": False})
        self.asked = 0

    async def receive(self) -> Message:
        self.asked += 1
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)


async def test_a_body_is_read_whole() -> None:
    assert await read_body(Client(b"ab", b"", b"c").receive, [], limit=3, deadline_s=1) == b"abc"
    assert await read_body(Client().receive, [], limit=0, deadline_s=1) == b""


@pytest.mark.threat("L01")
@pytest.mark.parametrize("declared", [b"1001", b"1000000000", b"9" * 100])
async def test_a_body_declared_too_large_is_refused_unread(declared: bytes) -> None:
    client = Client(b"x")

    with pytest.raises(BodyTooLarge) as caught:
        await read_body(client.receive, [(b"content-length", declared)], limit=1000, deadline_s=1)

    assert caught.value.limit == 1000
    assert client.asked == 0


@pytest.mark.threat("L01")
@pytest.mark.parametrize("headers", [[], [(b"content-length", b"10")]])
async def test_a_body_larger_than_declared_is_refused_as_soon_as_it_is(
    headers: list[tuple[bytes, bytes]],
) -> None:
    client = Client(*[b"x" * 100] * 1000)

    with pytest.raises(BodyTooLarge):
        await read_body(client.receive, headers, limit=250, deadline_s=1)

    assert client.asked == 3


@pytest.mark.threat("L01")
async def test_one_byte_at_a_time_is_a_body_too() -> None:
    assert await read_body(Client(*[b"x"] * 1000).receive, [], limit=1000, deadline_s=5) == b"x" * 1000


@pytest.mark.threat("F07")
async def test_a_body_that_does_not_come_is_too_slow() -> None:
    with pytest.raises(BodyTooSlow):
        await read_body(Client(b"x", stalls=True).receive, [], limit=10, deadline_s=0.01)


async def test_a_client_that_leaves_is_gone() -> None:
    with pytest.raises(ClientGone):
        await read_body(
            Client(b"x", leaves=True).receive, [(b"content-length", b"5")], limit=10, deadline_s=1
        )


@pytest.mark.threat("L01")
@pytest.mark.parametrize("encoding", [b"gzip", b"deflate", b"br", b"gzip, identity", b"Identity, gzip", b"x"])
async def test_a_compressed_body_is_refused_unread(encoding: bytes) -> None:
    client = Client(b"x")

    with pytest.raises(UnsupportedEncoding):
        await read_body(client.receive, [(b"content-encoding", encoding)], limit=10, deadline_s=1)

    assert client.asked == 0


@pytest.mark.threat("L01")
async def test_identity_is_no_compression() -> None:
    headers = [(b"content-encoding", b"Identity")]

    assert await read_body(Client(b"x").receive, headers, limit=10, deadline_s=1) == b"x"


@pytest.mark.threat("L11")
@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json",
        b"Application/JSON",
        b"application/json; charset=utf-8",
        b'application/json;charset="UTF-8"',
        b"application/json; v=1;",
    ],
)
def test_json_in_utf_8_is_taken(content_type: bytes) -> None:
    check_json_content_type([(b"content-type", content_type)])


@pytest.mark.threat("L11")
@pytest.mark.parametrize(
    "content_types",
    [
        [],
        [b""],
        [b"text/plain"],
        [b"text/plain; application/json"],
        [b"text/plain, application/json"],
        [b"application/json, text/plain"],
        [b"application/jsonp"],
        [b"application/x-www-form-urlencoded"],
        [b"multipart/form-data; boundary=" + b"x" * 10_000],
        [b"application/json; charset=utf-7"],
        [b"application/json; v=1; Charset=latin-1"],
        [b"application/json; charset=utf-8; charset=utf-7"],
        [b"application/json", b"application/json"],
        [b"application/json;" + b" ;" * 10_000],
    ],
)
def test_any_other_body_is_refused(content_types: list[bytes]) -> None:
    with pytest.raises(UnsupportedMediaType):
        check_json_content_type([(b"content-type", content_type) for content_type in content_types])


async def test_the_names_of_request_headers_are_those_of_the_server() -> None:
    request = Request(a_scope(b"/", (b"content-type", b"application/json")))

    check_json_content_type(request.scope["headers"])
