"""Requests to the real coordinator that are too large, too slow, too deep, or can be read in two ways."""

import contextlib
import gzip
import hashlib
import itertools
import json
import re
import select
import socket
import statistics
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.factories import HeldOverHttp, a_step
from tests.threats.stack import BODY_DEADLINE_S, HEADER_DEADLINE_S, Program, Stack, raw
from tests.trip.stage import until

MIB = 1024 * 1024
_NUMBERS = itertools.count(1)
JSON = {"Content-Type": "application/json"}


def post_json(stack: Stack, body: bytes, path: str = "/api/projects") -> httpx.Response:
    return stack.http.post(path, content=body, headers=JSON)


def refusal_in(answer: bytes) -> int:
    """The status of a raw answer, which must be a refusal in the contract's form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    told = json.loads(body)
    assert 400 <= status < 500, answer[:300]
    assert set(told) >= {"error", "code", "details"}, told
    return status


def whole_answer(line: socket.socket) -> bytes:
    """An answer as far as its head says that it goes, in as many pieces as it comes."""
    answer = b""
    while piece := line.recv(65536):
        answer += piece
        head, _, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *([0-9]+)", head)
        if length is not None and len(body) >= int(length[1]):
            break
    return answer


@pytest.fixture
def flat(stack: Stack) -> Iterator[Program]:
    """The coordinator, whose memory must not grow in this test by more than 20 MiB, not even for a moment."""
    coordinator = stack.coordinator
    stack.http.get("/healthz")
    before = coordinator.resident_bytes
    coordinator.forget_peak()
    yield coordinator
    assert coordinator.peak_bytes - before < 20 * MIB


# Too large


@pytest.mark.threat("L01")
def test_a_declared_gigabyte_is_refused_unread(stack: Stack, flat: Program) -> None:
    head = (
        b"POST /api/projects HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: 1073741824\r\n\r\n"
    )

    assert refusal_in(raw(stack, head, b"[" * 1000)) == 413


@pytest.mark.threat("L01")
def test_a_gigabyte_in_chunks_is_cut_where_it_is_too_large(stack: Stack, flat: Program) -> None:
    chunk = b"100000\r\n" + b" " * MIB + b"\r\n"
    sent = 0
    with socket.create_connection(("127.0.0.1", stack.port), timeout=20) as line:
        line.sendall(
            b"POST /api/projects HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        answer = b""
        try:
            for _ in range(1024):
                line.sendall(chunk)
                sent += MIB
                if select.select([line], [], [], 0)[0]:
                    answer = whole_answer(line)
                    break
        except OSError:
            pass  # cut while we were sending

    assert sent < 512 * MIB
    assert not answer or refusal_in(answer) == 413


@pytest.mark.threat("L01")
def test_a_body_in_single_bytes_is_a_body(stack: Stack, flat: Program) -> None:
    body = b'{"accountId":"a","name":"one by one"}'
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"

    answer = raw(
        stack,
        b"POST /api/projects HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n",
        chunks,
    )

    assert answer.startswith(b"HTTP/1.1 201")


@pytest.mark.threat("L01")
@pytest.mark.parametrize(
    "lengths",
    [b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: -1", b"Content-Length: " + b"9" * 20,
     b"Content-Length: 0x10", b"Content-Length: 5, 5", b"Content-Length: 5\r\nTransfer-Encoding: chunked"],
)  # fmt: skip
def test_a_length_that_lies_is_refused(stack: Stack, flat: Program, lengths: bytes) -> None:
    head = b"POST /api/projects HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    answer = raw(stack, head + lengths + b"\r\nConnection: close\r\n\r\n[1,2]")

    assert refusal_in(answer) in (400, 413)


@pytest.mark.threat("L01")
def test_a_body_shorter_than_its_length_is_not_waited_for_for_ever(stack: Stack, flat: Program) -> None:
    begun = time.monotonic()

    answer = raw(
        stack,
        b"POST /api/projects HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\nConnection: close\r\n\r\n{",
    )

    assert refusal_in(answer) == 408
    assert time.monotonic() - begun < BODY_DEADLINE_S + 10


@pytest.mark.threat("L01")
def test_a_compressed_bomb_stays_compressed(stack: Stack, flat: Program) -> None:
    bomb = gzip.compress(b"[" * (256 * MIB), 1)[: MIB - 1]

    answer = stack.http.post("/api/projects", content=bomb, headers={**JSON, "Content-Encoding": "gzip"})

    stack.refused(answer, 415)


@pytest.mark.threat("L01")
def test_a_compressed_log_is_inflated_no_further_than_a_log_may_be(stack: Stack, flat: Program) -> None:
    held = held_step(stack)
    bomb = gzip.compress(bytes(200 * MIB))

    answer = held.append(0, bomb, **{"Content-Encoding": "gzip"})

    stack.refused(answer, 413)
    held.complete("failed")


# Too deep, too many, too long


@pytest.mark.threat("L02")
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="depth"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="objects"),
        pytest.param(b'{"accountId":"a","name":"a","x":' + b"[" * 5000 + b"]" * 5000 + b"}", id="inside"),
        pytest.param(b"{" + b",".join(b'"k%d":1' % n for n in range(80_000)) + b"}", id="keys"),
        pytest.param(b'{"accountId":"a","name":"' + b"x" * 1_000_000 + b'"}', id="string"),
        pytest.param(b'{"accountId":"a","name":' + b"9" * 100_000 + b"}", id="digits"),
        pytest.param(b'{"accountId":"a","name":0.' + b"9" * 100_000 + b"}", id="fraction"),
        pytest.param(b"[" + b"1," * 400_000 + b"1]", id="values"),
        pytest.param(b'"\\' * 400_000, id="escapes"),
    ],
)
def test_a_body_that_is_costly_to_read_is_refused_quickly(stack: Stack, body: bytes) -> None:
    begun = time.monotonic()
    answer = post_json(stack, body)

    stack.refused(answer, 400)
    assert time.monotonic() - begun < 2  # a tenth of a second on an idle machine


@pytest.mark.threat("L02")
def test_too_many_keys_do_not_fit_at_all(stack: Stack) -> None:
    body = b"{" + b",".join(b'"k%d":1' % n for n in range(1_000_000)) + b"}"

    stack.refused(post_json(stack, body), 413)
    stack.refused(post_json(stack, b'"' + b"x" * 10_000_000 + b'"'), 413)


# Two readings


@pytest.mark.threat("L03")
@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"accountId":"a","name":"x","name":"y"}', "name"),
        (b'{"accountId":"a","name":"x","\\u006eame":"y"}', "name"),
        (b'{"accountId":"a","name":"x","z":{"b":1,"b":2}}', "z.b"),
    ],
)
def test_a_key_that_stands_twice_is_refused(stack: Stack, body: bytes, path: str) -> None:
    stack.refused(post_json(stack, body), path=path)


@pytest.mark.threat("L04")
@pytest.mark.parametrize(
    "value",
    ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "-0", "1.0", "1.5", "true", '"1"', "null", "[1]",
     "1e2", "01", "+1", "0x1", "1_000", "١"],
)  # fmt: skip
def test_only_an_integer_is_an_integer(stack: Stack, value: str) -> None:
    project = stack.a_project()
    step = json.dumps(a_step()).removesuffix("}") + f', "timeoutSeconds": {value}}}'
    body = f'{{"name": "w", "steps": [{step}]}}'.encode()

    stack.refused(post_json(stack, body, f"/api/projects/{project}/workflows"))


@pytest.mark.threat("L04")
@pytest.mark.parametrize("value", ['"true"', "1", "0", "null", "[]"])
def test_only_a_truth_is_a_truth(stack: Stack, value: str) -> None:
    body = f'{{"slug": "x", "imageUrl": "x", "public": {value}}}'.encode()

    stack.refused(post_json(stack, body, "/api/docker-images"), path="public")


@pytest.mark.threat("L05")
@pytest.mark.threat("L06")
@pytest.mark.parametrize(
    "text",
    [b"\\u0000", b"\\ud800", b"\\udc00\\ud800", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\x00", b"\x1f"],
)
def test_text_that_cannot_be_stored_is_refused(stack: Stack, text: bytes) -> None:
    stack.refused(post_json(stack, b'{"accountId":"a","name":"x' + text + b'"}'))
    stack.refused(post_json(stack, b'{"accountId":"a","name":"x","' + text + b'":1}'))


@pytest.mark.threat("L06")
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff"])
def test_a_body_in_another_encoding_is_refused(stack: Stack, mark: bytes) -> None:
    stack.refused(post_json(stack, mark + b'{"accountId":"a","name":"x"}'))
    stack.refused(post_json(stack, '{"accountId":"a","name":"x"}'.encode("utf-16")))


@pytest.mark.threat("L06")
def test_bytes_that_are_no_text_are_refused_in_path_query_and_headers(stack: Stack) -> None:
    for head in (
        b"GET /api/projects?accountId=\xff HTTP/1.1\r\nHost: localhost",
        b"GET /api/projects?accountId=%FF HTTP/1.1\r\nHost: localhost",
        b"GET /api/projects?accountId=%ED%A0%80 HTTP/1.1\r\nHost: localhost",
        b"GET /api/builds/\xff HTTP/1.1\r\nHost: localhost",
        b"GET /api/builds/%FF HTTP/1.1\r\nHost: localhost",
        b"GET /api/runners HTTP/1.1\r\nHost: local\xffhost",
    ):
        answer = raw(stack, head + b"\r\nConnection: close\r\n\r\n")

        assert refusal_in(answer) in (400, 404)


@pytest.mark.threat("L06")
def test_a_secret_that_is_no_text_is_no_secret(stack: Stack) -> None:
    head = b"POST /api/runner/bye HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 0\r\n"

    for secret in (b"\xff\xfe", b"\xed\xa0\x80", b"a" * 10_000, b"a b", b""):
        answer = raw(stack, head + b"Authorization: Bearer " + secret + b"\r\n\r\n")

        assert refusal_in(answer) in (400, 401)


# Logs are bytes


def held_step(stack: Stack) -> HeldOverHttp:
    """A step that this test holds in its hands, as a runner would."""
    label = f"by-hand-{next(_NUMBERS)}"
    runner = stack.api.a_runner(label)
    stack.submit([a_step(labels=[label], outputPaths=["**"])])
    claims = stack.api.acquire(runner, labels=[label])
    held = HeldOverHttp(stack.http, claims[0], runner)
    assert held.post("start", {}).status_code == 200
    return held


@pytest.mark.threat("L07")
def test_a_log_may_hold_any_bytes(stack: Stack) -> None:
    held = held_step(stack)
    data = b"\x00\xff\xfe\xed\xa0\x80\xc0\xaf\x1b]0;x\x07\r\n" + bytes(range(256)) * 8

    assert held.append(0, data).status_code == 200
    assert held.complete("failed", logSize=len(data), exitCode=1).status_code == 200

    assert stack.log(held.step_id) == data
    followed = stack.http.get(f"/api/steps/{held.step_id}/log?follow=true")
    assert followed.status_code == 200
    assert b"event: end" in followed.content


@pytest.mark.threat("L07")
def test_logs_of_a_bare_completion_may_hold_odd_text(stack: Stack) -> None:
    build = stack.submit([a_step(labels=["nobody"])])
    step = build["steps"][0]["id"]

    answer = stack.http.post(
        f"/api/runner/{step}/complete", json={"status": "failed", "logs": "\x1b[2J\u202e\ufffd\r\n"}
    )

    assert answer.status_code == 200
    assert stack.log(step).decode() == "\x1b[2J\u202e\ufffd\r\n"
    stack.refused(post_json(stack, b'{"status":"failed","logs":"\\u0000"}', f"/api/runner/{step}/complete"))


# Numbers and pages


@pytest.mark.threat("L08")
@pytest.mark.threat("L09")
@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=-1", "limit=101", "limit=1000000000", "limit=2147483648", "limit=9223372036854775808",
     f"limit={10**30}", "limit=1;drop", "limit=1&limit=2", "limit[]=1", "limit=", "limit=1.0", "limit=1e1",
     "limit=%201", "limit=+1", "limit=0x1", "limit=null", "limit=true", "offset=-1",
     "offset=9223372036854775807", f"offset={10**30}",
     "offset=-9223372036854775809", "offset=", "Limit=1", "page=1", "limit=%D9%A1"],
)  # fmt: skip
def test_a_page_that_does_not_exist_is_refused(stack: Stack, query: str) -> None:
    project = stack.a_project()

    stack.refused(stack.http.get(f"/api/projects/{project}/builds?{query}"))


@pytest.mark.threat("L09")
@pytest.mark.parametrize("query", ["limit=1001", "limit=0", "offset=-1", "limit=1&limit=1", "sort=x"])
def test_a_page_of_the_trail_has_its_own_bounds(stack: Stack, query: str) -> None:
    stack.refused(stack.http.get(f"/api/audit-logs?{query}"))


@pytest.mark.threat("L08")
@pytest.mark.parametrize("number", [2**31, 2**53 + 2, 2**63 - 1, 2**63, -1, -(2**63), 10**30, 0])
def test_numbers_that_no_column_holds_are_refused(stack: Stack, number: int) -> None:
    for fields in (
        {"timeoutSeconds": number},
        {"resources": {"memoryMb": number}},
        {"resources": {"pids": number}},
        {"resources": {"cpus": number if number > 1024 or number < 1 else -1}},
    ):
        stack.refused(stack.post_workflow(a_step(**fields)))
    held = held_step(stack)
    stack.refused(
        held.append(number if number else "-0x", b"x"), 400 if number <= 0 or number > 2**53 else 416
    )
    if not 0 <= number < 2**53:
        stack.refused(held.complete("failed", logSize=number))
    if not -(2**31) <= number < 2**31:
        stack.refused(held.complete("failed", exitCode=number))
    assert held.complete("failed", exitCode=1).status_code == 200


@pytest.mark.threat("L08")
@pytest.mark.parametrize(
    "text", ["0", "-1", "1" * 30, "null", "*", "00000000-0000-0000-0000-000000000000", "x" * 5000]
)
def test_an_id_that_is_none_is_not_found(stack: Stack, text: str) -> None:
    for path in ("projects/{}", "builds/{}", "builds/{}/artifacts", "artifacts/{}", "steps/{}/log",
                 "projects/{}/builds", "projects/{}/workflows", "projects/{}/workflows/{}"):  # fmt: skip
        stack.refused(stack.http.get("/api/" + path.replace("{}", text)), 404)
    stack.refused(stack.http.post(f"/api/builds/{text}/cancel"), 404)
    stack.refused(stack.http.post(f"/api/runner/{text}/complete", json={"status": "success"}), 404)


# Ranges


@pytest.fixture
def artifact(stack: Stack) -> str:
    """The path of one with ten bytes."""
    held = held_step(stack)
    sha256 = hashlib.sha256(b"0123456789").hexdigest()
    assert held.put_blob(sha256, b"0123456789").is_success
    entry = {"path": "ten.txt", "size": 10, "sha256": sha256, "type": "file", "mode": 0o644}
    assert held.complete("success", artifacts=[entry], exitCode=0).status_code == 200
    build = stack.http.get(f"/api/builds/{held.claim['buildId']}/artifacts").json()
    return f"/api/artifacts/{build[0]['id']}"


@pytest.mark.threat("D18")
def test_a_range_is_answered_as_the_standard_says(stack: Stack, artifact: str) -> None:
    expected = {
        "bytes=0-0": (206, b"0"),
        "bytes=2-4": (206, b"234"),
        "bytes=5-": (206, b"56789"),
        "bytes=-3": (206, b"789"),
        "bytes=-100": (206, b"0123456789"),
        "bytes=0-99999999999": (206, b"0123456789"),
        "bytes=10-": (416, None),
        "bytes=-0": (416, None),
        "bytes=18446744073709551615-": (200, b"0123456789"),  # more digits than any length has: no range
        "bytes=9223372036854775807-": (416, None),
        "bytes=-": (200, b"0123456789"),
        "-": (200, b"0123456789"),
        "bytes=9-1": (200, b"0123456789"),
        "bytes=a-b": (200, b"0123456789"),
        "lines=0-1": (200, b"0123456789"),
        "bytes=0-0,1-1": (200, b"0123456789"),
        "bytes=" + ",".join(["0-0"] * 10_000): (200, b"0123456789"),
        "bytes=" + "9" * 10_000 + "-": (200, b"0123456789"),
    }

    for wanted, (status, body) in expected.items():
        begun = time.monotonic()
        answer = stack.http.get(artifact, headers={"Range": wanted})

        assert time.monotonic() - begun < 1
        assert answer.status_code == status, (wanted[:40], answer.status_code)
        assert body is None or answer.content == body, wanted[:40]
        if status == 416:
            stack.refused(answer, 416)
        else:
            assert answer.headers["content-disposition"].startswith("attachment")


# Too slow


@pytest.mark.threat("F05")
def test_readers_of_a_log_that_take_nothing_cost_little_and_slow_nobody(stack: Stack) -> None:
    held = held_step(stack)
    line_of_log = b"x" * 1023 + b"\n"
    assert held.append(0, line_of_log * 1024).status_code == 200
    size = 1024 * len(line_of_log)
    before = stack.coordinator.resident_bytes
    stack.coordinator.forget_peak()
    wish = f"GET /api/steps/{held.step_id}/log?follow=true HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    with contextlib.ExitStack() as stay:
        for _ in range(200):
            stalled = stay.enter_context(socket.socket())
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.settimeout(20)
            stalled.connect(("127.0.0.1", stack.port))
            stalled.sendall(wish)
        headers = {"Last-Event-ID": f"1:{size}"}
        follow = f"http://127.0.0.1:{stack.port}/api/steps/{held.step_id}/log?follow=true"
        reader = stay.enter_context(httpx.stream("GET", follow, headers=headers, timeout=20, trust_env=False))
        heard = reader.iter_lines()
        lags = []
        for number in range(10):
            news = f"line {number}\n".encode()
            begun = time.monotonic()
            assert held.append(size, news).status_code == 200
            size += len(news)
            while f"line {number}" not in next(heard):
                pass
            lags.append(time.monotonic() - begun)
        grown = stack.coordinator.peak_bytes - before

    assert held.complete("failed", exitCode=1, logSize=size).status_code == 200
    assert statistics.median(lags[1:]) < 1, lags  # the first line comes while two hundred still arrive
    assert grown < 50 * MIB, f"{grown // MIB} MiB"


@pytest.mark.threat("F07")
def test_slow_senders_neither_stay_nor_slow_others(stack: Stack) -> None:
    slow = [socket.create_connection(("127.0.0.1", stack.port), timeout=20) for _ in range(500)]
    try:
        for number, line in enumerate(slow):
            line.sendall((b"", b"G", b"GET / HTTP/1.1\r\nHost: loc", b"\r\n")[number % 4])

        waits = []
        for _ in range(40):
            begun = time.monotonic()
            assert stack.http.get("/healthz").status_code == 200
            waits.append(time.monotonic() - begun)
            for line in slow[::10]:
                try:
                    line.send(b"a")  # a byte now and then
                except OSError:
                    continue
            time.sleep(0.05)
        until(lambda: all(_is_closed(line) for line in slow), HEADER_DEADLINE_S + 15)
    finally:
        for line in slow:
            line.close()

    assert statistics.quantiles(waits, n=100)[98] < 1  # half a second on an idle machine


@pytest.mark.threat("F07")
def test_a_body_that_trickles_is_cut(stack: Stack) -> None:
    head = (
        b"POST /api/projects HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000\r\n\r\n"
    )
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", stack.port), timeout=20) as line:
        line.sendall(head)
        while not select.select([line], [], [], 0.5)[0]:
            line.sendall(b" ")
            assert time.monotonic() - begun < BODY_DEADLINE_S + 10
        answer = whole_answer(line)

    assert refusal_in(answer) == 408


def _is_closed(line: socket.socket) -> bool:
    """Whether the other side has closed; what it said before is thrown away."""
    try:
        while select.select([line], [], [], 0)[0]:
            if not line.recv(65536):
                return True
    except OSError:
        return True
    return False
