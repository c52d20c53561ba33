"""A real server on a loopback port, and clients that mean it no good."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from coordinator.api.guards import BodyTooLarge, read_body
from coordinator.api.server import Limits, make_server

DEADLINE_S = 0.3
LIMITS = Limits(drain_s=0.3, write_stall_s=0.3)
PLAIN = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def hello(request: Request) -> Response:
    return PlainTextResponse("hello")


async def echo(request: Request) -> Response:
    return Response(await request.body())


async def headers(request: Request) -> Response:
    await request.body()
    return Response(json.dumps([[name, value] for name, value in request.headers.items()]))


async def small(request: Request) -> Response:
    try:
        body = await read_body(request.receive, request.scope["headers"], limit=1000, deadline_s=0.2)
    except BodyTooLarge as error:
        return PlainTextResponse(str(error), status_code=413)
    return PlainTextResponse(f"{len(body)}")


async def unread(request: Request) -> Response:
    return PlainTextResponse("no", status_code=401)


async def slow(request: Request) -> Response:
    """Takes longer than any deadline of the connection, as a long poll does."""
    await asyncio.sleep(2 * DEADLINE_S)
    return PlainTextResponse("slow")


async def gone(request: Request) -> Response:
    """Waits until its client has left, and says so to the test."""
    await request.body()
    await request.receive()
    request.app.state.left.set()
    return Response()


async def endless(request: Request) -> Response:
    async def zeros() -> object:
        try:
            while True:
                yield bytes(64 * 1024)
                await asyncio.sleep(0)  # sending to a client that has left never waits
        finally:
            request.app.state.left.set()

    return StreamingResponse(zeros())


def an_app() -> Starlette:
    app = Starlette(
        routes=[
            Route("/", hello),
            Route("/echo", echo, methods=["POST"]),
            Route("/headers", headers, methods=["GET", "POST"]),
            Route("/small", small, methods=["POST"]),
            Route("/unread", unread, methods=["POST"]),
            Route("/slow", slow),
            Route("/gone", gone),
            Route("/endless", endless),
        ]
    )
    app.state.left = threading.Event()
    return app


@contextlib.contextmanager
def serving(app: Starlette, limits: Limits, timeout_keep_alive: int = 30) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        port: int = listener.getsockname()[1]
        server: uvicorn.Server = make_server(
            app,
            host="unused",
            port=0,
            fd=listener.fileno(),
            header_deadline_s=DEADLINE_S,
            timeout_keep_alive=timeout_keep_alive,
            log_level="critical",
            limits=limits,
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def app() -> Starlette:
    return an_app()


@pytest.fixture(scope="module")
def port(app: Starlette) -> Iterator[int]:
    with serving(app, LIMITS) as port:
        assert exchange(port, PLAIN, until=b"hello").startswith(b"HTTP/1.1 200")
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def read_until_closed(sock: socket.socket) -> bytes:
    received = b""
    while True:
        try:
            chunk = sock.recv(65536)
        except ConnectionResetError:
            return received
        if not chunk:
            return received
        received += chunk


def read_until(sock: socket.socket, end: bytes) -> bytes:
    received = b""
    while end not in received:
        chunk = sock.recv(65536)
        assert chunk, received
        received += chunk
    return received


def exchange(port: int, sent: bytes, until: bytes | None = None) -> bytes:
    """Send bytes, then read until these bytes have come or, if there are none, until the server closes."""
    with connect(port) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(sent)
        if until is None:
            return read_until_closed(sock)
        return read_until(sock, until)


def seconds_of(action: Callable[[], object]) -> float:
    started = time.monotonic()
    action()
    return time.monotonic() - started


@pytest.mark.threat("F07")
def test_a_connection_that_says_nothing_is_closed(port: int) -> None:
    with connect(port) as sock:
        waited = seconds_of(lambda: read_until_closed(sock))

    assert waited < DEADLINE_S + 1


@pytest.mark.threat("F07")
def test_headers_that_come_byte_by_byte_are_cut_at_the_deadline(port: int) -> None:
    with connect(port) as sock:
        sock.settimeout(0.05)
        started = time.monotonic()
        received = b""
        for byte in PLAIN[:-1] + b"X: " + b"y" * 100_000:
            sock.send(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                received = sock.recv(65536)
                break

    assert received.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started < DEADLINE_S + 1


@pytest.mark.threat("F07")
@pytest.mark.parametrize("first", [b"", PLAIN])
def test_empty_lines_do_not_keep_a_connection_alive(port: int, first: bytes) -> None:
    with connect(port) as sock:
        if first:
            sock.sendall(first)
            assert read_until(sock, b"hello").startswith(b"HTTP/1.1 200 ")

        sock.settimeout(0.05)
        started = time.monotonic()
        closed = False
        while not closed and time.monotonic() - started < 5:
            with contextlib.suppress(TimeoutError, ConnectionError):
                sock.send(b"\r\n")
                closed = sock.recv(1) == b""

    assert time.monotonic() - started < DEADLINE_S + 1


@pytest.mark.threat("F07")
def test_a_second_request_on_a_connection_has_the_same_deadline(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(PLAIN)
        assert read_until(sock, b"hello").startswith(b"HTTP/1.1 200 ")

        sock.sendall(PLAIN[:10])
        rest = read_until_closed(sock)

    assert rest.startswith(b"HTTP/1.1 408")


@pytest.mark.threat("F07")
def test_two_hundred_slow_senders_do_not_keep_a_request_waiting(port: int) -> None:
    with contextlib.ExitStack() as open_sockets:
        crowd = []
        for _ in range(200):
            sock = open_sockets.enter_context(connect(port))
            sock.sendall(PLAIN[:-2])  # before the next: who sends to a closed door does not see its answer
            crowd.append(sock)

        waited = seconds_of(lambda: exchange(port, PLAIN, until=b"hello"))

        assert waited < DEADLINE_S + 1  # one after another they would take a minute
        assert all(read_until_closed(sock).startswith(b"HTTP/1.1 408") for sock in crowd)


def test_an_idle_connection_is_closed_after_the_keep_alive_time() -> None:
    with serving(an_app(), LIMITS, timeout_keep_alive=1) as port, connect(port) as sock:
        sock.sendall(PLAIN)
        assert read_until(sock, b"hello").startswith(b"HTTP/1.1 200 ")

        waited = seconds_of(lambda: read_until_closed(sock))

    assert 0.5 < waited < 3


def test_an_idle_connection_is_not_held_to_the_header_deadline(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(PLAIN)
        assert read_until(sock, b"hello").startswith(b"HTTP/1.1 200 ")
        sock.settimeout(2 * DEADLINE_S)
        with pytest.raises(TimeoutError):
            sock.recv(1)

        sock.sendall(PLAIN)

        assert read_until(sock, b"hello").startswith(b"HTTP/1.1 200 ")


def test_an_answer_may_take_longer_than_the_header_deadline(port: int) -> None:
    answer = exchange(port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n", until=b"slow")

    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.threat("F07")
@pytest.mark.parametrize("unfinished", [b"GET /", b"\x16\x03\x01 garbage\r\n\r\n"])
def test_what_follows_a_request_does_not_disturb_its_answer(port: int, unfinished: bytes) -> None:
    answer = exchange(port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n" + unfinished)

    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"slow")
    assert answer.count(b"\r\ndate: ") == 1


def test_empty_lines_while_an_answer_is_awaited_do_no_harm(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with pytest.raises(TimeoutError):
            sock.settimeout(0.05)
            sock.recv(1)

        sock.settimeout(5)
        sock.sendall(b"\r\n")

        assert read_until_closed(sock).endswith(b"slow")


@pytest.mark.threat("L13")
def test_pipelined_requests_are_answered_in_order_up_to_the_garbage(port: int) -> None:
    slow_one = b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"

    answer = exchange(port, slow_one + PLAIN + b"\x00\x01garbage\r\n\r\n" + PLAIN)

    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.index(b"slow") < answer.index(b"hello")
    assert answer.endswith(b"hello")


@pytest.mark.threat("L13")
def test_a_pipelined_request_with_a_broken_body_is_not_run(port: int) -> None:
    broken = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"

    answer = exchange(port, b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n" + broken)

    assert answer.count(b"\r\ndate: ") == 1
    assert answer.endswith(b"slow")


@pytest.mark.threat("L13")
def test_a_flood_of_pipelined_requests_is_bounded(port: int) -> None:
    slow_one = b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n"

    answer = exchange(port, slow_one + PLAIN * 1000)

    assert answer.count(b"HTTP/1.1 200") <= LIMITS.pipelined + 1


@pytest.mark.threat("L13")
def test_a_request_hears_that_its_client_left_though_another_waits_behind_it(
    app: Starlette, port: int
) -> None:
    app.state.left.clear()

    with connect(port) as sock:
        sock.sendall(b"GET /gone HTTP/1.1\r\nHost: localhost\r\n\r\n" + PLAIN)
        # The second request pauses reading; only the reset tells.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")

    assert app.state.left.wait(timeout=5)


@pytest.mark.threat("L12")
@pytest.mark.parametrize(
    ("sent", "status"),
    [
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 2**20 + b"\r\n\r\n", 431, id="a header of 1 MB"
        ),
        pytest.param(b"GET / HTTP/1.1\r\nX: " + b"y" * 2**20, 431, id="an endless header"),
        pytest.param(
            b"GET / HTTP/1.1\r\n" + (b"X: " + b"y" * 1500 + b"\r\n") * 60 + b"\r\n", 431, id="60 long headers"
        ),
        pytest.param(b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 10_000 + b"\r\n", 431, id="10,000 headers"),
        pytest.param(b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, id="a long path"),
        pytest.param(b"GET /" + b"x" * 2**20, 414, id="an endless path"),
        pytest.param(b"GET /\r\n\r\n", 505, id="HTTP/0.9"),
        pytest.param(b"GET / HTTP/0.9\r\n\r\n", 505, id="HTTP/0.9 by name"),
        pytest.param(b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505, id="HTTP/2 by name"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, id="the HTTP/2 preface"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x00b\r\n\r\n", 400, id="NUL in a value"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX\x00: b\r\n\r\n", 400, id="NUL in a name"),
        pytest.param(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400, id="a space before the colon"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n", 400, id="a folded header"),
        pytest.param(b"GET / HTTP/1.1\nHost: a\n\n", 400, id="bare line feeds"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n", 400, id="a bare carriage return"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, id="TLS"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n", 400, id="a control character"),
    ],
)
def test_a_malformed_head_is_refused_and_the_connection_closed(port: int, sent: bytes, status: int) -> None:
    answer = exchange(port, sent)

    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close\r\n" in answer
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


@pytest.mark.threat("L12")
@pytest.mark.parametrize(
    "framing",
    [
        pytest.param(b"Content-Length: 5\r\nTransfer-Encoding: chunked", id="length, then chunks"),
        pytest.param(b"Transfer-Encoding: chunked\r\nContent-Length: 5", id="chunks, then length"),
        pytest.param(b"Content-Length: 5\r\nContent-Length: 5", id="one length twice"),
        pytest.param(b"Content-Length: 5\r\nContent-Length: 6", id="two lengths"),
        pytest.param(b"Content-Length: 5, 5", id="a list of lengths"),
        pytest.param(b"Content-Length: +5", id="a signed length"),
        pytest.param(b"Content-Length: 99999999999999999999999", id="a huge length"),
        pytest.param(b"Transfer-Encoding: gzip, chunked", id="compressed transfer"),
        pytest.param(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", id="chunks twice"),
        pytest.param(b"Transfer-Encoding: xchunked", id="an unknown transfer"),
        pytest.param(b"Transfer-Encoding: identity", id="identity"),
    ],
)
def test_a_body_whose_length_can_be_read_in_two_ways_is_refused(port: int, framing: bytes) -> None:
    smuggled = b"0\r\n\r\n" + PLAIN

    answer = exchange(port, b"POST /echo HTTP/1.1\r\nHost: localhost\r\n" + framing + b"\r\n\r\n" + smuggled)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"\r\ndate: ") == 1


@pytest.mark.threat("L12")
def test_chunks_are_refused_in_http_1_0(port: int) -> None:
    head = b"POST /echo HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"

    assert exchange(port, head + b"0\r\n\r\n").startswith(b"HTTP/1.1 400 ")


@pytest.mark.threat("L12")
@pytest.mark.parametrize(
    "chunks", [b"5\nhello\n0\n\n", b"0x5\r\nhello\r\n0\r\n\r\n", b"ffffffffffffffffff\r\nx"]
)
def test_malformed_chunks_are_refused(port: int, chunks: bytes) -> None:
    head = b"POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"

    assert exchange(port, head + chunks).startswith(b"HTTP/1.1 400 ")


@pytest.mark.threat("L12")
def test_a_trailer_does_not_become_a_header(port: int) -> None:
    head = b"POST /headers HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"

    answer = exchange(port, head + b"2\r\nhi\r\n0\r\nAuthorization: Bearer x\r\n\r\n", until=b"]]")

    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"Bearer" not in answer


@pytest.mark.threat("A17")
@pytest.mark.parametrize(
    "target", [b"http://evil/", b"@google.com", b"*", b"/#x", b"evil:80", b"//\xff", b"/\x00"]
)
@pytest.mark.parametrize("method", [b"GET", b"OPTIONS", b"CONNECT"])
def test_a_target_that_is_no_path_is_refused(port: int, method: bytes, target: bytes) -> None:
    answer = exchange(port, method + b" " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.threat("L12")
@pytest.mark.parametrize("pause", [False, True])
def test_an_offer_of_http_2_is_ignored_and_its_body_kept(port: int, pause: bool) -> None:
    body = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = (
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAMAAABk\r\nContent-Length: %d\r\n\r\n" % len(body)
    )
    with connect(port) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if pause:
            sock.sendall(head[:50])
            time.sleep(0.02)  # two segments, so that the offer does not arrive in one piece
            sock.sendall(head[50:])
            time.sleep(0.02)
            sock.sendall(body)
        else:
            sock.sendall(head + body)
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = read_until_closed(sock)

    assert answer.count(b"HTTP/1.1 200") == 2
    assert body in answer
    assert answer.endswith(b"hello")


@pytest.mark.threat("L01")
@pytest.mark.parametrize("length", [b"Content-Length: 1000000000", b"Transfer-Encoding: chunked"])
def test_a_body_that_is_refused_is_not_waited_for(port: int, length: bytes) -> None:
    with connect(port) as sock:
        sock.sendall(b"POST /small HTTP/1.1\r\nHost: localhost\r\n" + length + b"\r\n\r\n")
        started = time.monotonic()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while time.monotonic() - started < 5:
                sock.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
        sent_for = time.monotonic() - started
        answer = read_until_closed(sock)

    assert answer.startswith(b"HTTP/1.1 413 ")
    assert sent_for < LIMITS.drain_s + 1


@pytest.mark.threat("L01")
def test_a_connection_goes_on_when_the_unread_body_was_short(port: int) -> None:
    head = b"POST /unread HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n"
    with connect(port) as sock:
        sock.sendall(head)
        assert read_until(sock, b"no").startswith(b"HTTP/1.1 401 ")
        sock.sendall(b"hello")
        sock.settimeout(2 * LIMITS.drain_s)
        with pytest.raises(TimeoutError):
            sock.recv(1)

        sock.sendall(PLAIN)

        assert read_until(sock, b"hello").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path", [b"/echo", b"/unread"])
def test_the_last_piece_of_a_body_does_not_count_as_a_head(app: Starlette, path: bytes) -> None:
    limits = replace(LIMITS, head_bytes=1000)
    body = bytes(20 * limits.head_bytes)
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (path, len(body))

    with serving(app, limits) as port, connect(port) as sock:
        sock.sendall(head)
        time.sleep(DEADLINE_S / 3)  # so that the body is read by itself
        sock.sendall(body)
        time.sleep(DEADLINE_S / 3)
        sock.sendall(PLAIN)
        answers = read_until(sock, b"hello")

    assert b" 431 " not in answers


@pytest.mark.threat("F07")
def test_a_body_that_trickles_after_its_answer_is_cut(port: int) -> None:
    with connect(port) as sock:
        sock.sendall(b"POST /unread HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n")
        assert read_until(sock, b"no").startswith(b"HTTP/1.1 401 ")
        sock.settimeout(0.05)
        started = time.monotonic()
        closed = False
        while not closed and time.monotonic() - started < 5:
            try:
                sock.send(b"x")
                closed = sock.recv(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                closed = True

    assert time.monotonic() - started < LIMITS.drain_s + 1


@pytest.mark.threat("F05")
@pytest.mark.threat("F07")
def test_a_client_that_does_not_read_its_answer_is_cut(app: Starlette, port: int) -> None:
    app.state.left.clear()

    with connect(port) as sock:
        sock.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")

        assert app.state.left.wait(timeout=5)


@pytest.mark.threat("F07")
def test_more_connections_than_allowed_are_closed_at_once() -> None:
    limits = Limits(connections=3)
    with serving(an_app(), limits) as port, contextlib.ExitStack() as open_sockets:
        answered = [open_sockets.enter_context(connect(port)) for _ in range(3)]
        for sock in answered:
            sock.sendall(PLAIN)
            assert read_until(sock, b"hello").startswith(b"HTTP/1.1 200 ")

        assert exchange(port, PLAIN) == b""

        answered[0].sendall(PLAIN)
        assert read_until(answered[0], b"hello").startswith(b"HTTP/1.1 200 ")


@pytest.mark.threat("A18")
def test_a_forwarded_address_is_not_believed() -> None:
    seen: list[object] = []

    async def who(request: Request) -> Response:
        seen.append((request.scope["client"][0], request.scope["scheme"]))
        return PlainTextResponse("hello")

    forged = b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 8.8.8.8\r\nX-Forwarded-Proto: https\r\n\r\n"
    with serving(Starlette(routes=[Route("/", who)]), LIMITS) as port:
        answer = exchange(port, forged, until=b"hello")

    assert seen == [("127.0.0.1", "http")]
    assert b"\r\ndate: " in answer
    assert b"\r\nserver:" not in answer
