"""Bodies, queries, headers and connections below /api/v1 that no honest client sends, on both databases."""

import contextlib
import gzip
import json
import random
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from starlette.applications import Starlette
from structlog.testing import capture_logs

from coordinator.actions.change_project import change_project
from coordinator.settings import Settings
from coordinator.store.dialect import Database
from shared.ids import new_id
from tests.coordinator.live_logs import Served, served
from tests.factories import LOCAL, ON_SQLITE, PASSWORD, MadeUser, Mill, a_spec
from tests.trip.stage import until

MIB = 1024 * 1024
PREFIX = "/api/v1"
FORM = {"error", "code", "timestamp", "trace_id", "details"}
OURS_ALONE = re.compile(r"Traceback|sqlalchemy|psycopg|sqlite3|SELECT |coordinator/|\.py\b")

Ask = Callable[..., httpx.Response]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"auth": "token", "rate_limit": 0, "rate_limit_peer": 0})


@pytest.fixture
def owner(mill: Mill) -> MadeUser:
    return mill.a_user(acme="owner")


@pytest.fixture
def headers(mill: Mill, owner: MadeUser) -> dict[str, str]:
    return {**mill.a_login(owner), "X-Tenant-ID": mill.a_tenant()}


@pytest.fixture
def project(mill: Mill) -> str:
    """One that builds can be made of."""
    project_id = mill.a_project()
    mill.now(change_project, mill.site, LOCAL, project_id, {"repo_url": "https://git.example/owner/name"})
    mill.a_workflow(project_id, a_spec())
    return project_id


@pytest.fixture
def ask(client: httpx.Client, headers: dict[str, str]) -> Ask:
    """In the name of the owner."""

    def asked(method: str, path: str, body: bytes | None = None, **more: str | bytes) -> httpx.Response:
        told: Any = {**headers, **more}
        if body is not None:
            told.setdefault("Content-Type", "application/json")
        return client.request(method, PREFIX + path, content=body, headers=told)

    return asked


def refused(answer: httpx.Response, status: int = 400) -> dict[str, Any]:
    """A refusal in the form of this surface, which tells nothing of how it was made."""
    assert answer.status_code == status, (answer.status_code, answer.text[:300])
    told: dict[str, Any] = answer.json()
    assert set(told) == FORM
    assert told["error"] and told["code"] and re.fullmatch("[0-9a-f]{32}", told["trace_id"])
    assert OURS_ALONE.search(answer.text) is None
    return told


def every_door(project: str) -> list[tuple[str, str]]:
    """Where a body is read: before anybody is known, for what is new, and for what changes."""
    doors = [("POST", "/auth/login"), ("POST", "/builds"), ("PATCH", f"/projects/{project}")]
    return [*doors, ("POST", "/auth/ws-tickets"), ("POST", "/auth/refresh"), ("POST", "/auth/password")]


def fields_of(path: str, project: str) -> dict[str, Any]:
    """A body that would be taken."""
    return {
        "/auth/login": {"email": "ann@acme.test", "password": PASSWORD},
        "/builds": {"project_id": project, "git_branch": "main"},
        "/auth/ws-tickets": {"build_id": project},
        "/auth/refresh": {"refresh_token": "x"},
        "/auth/password": {"current_password": PASSWORD, "new_password": PASSWORD},
    }.get(path, {"default_branch": "main"})


# Too large, too deep


@pytest.mark.threat("L01")
@ON_SQLITE
def test_a_body_that_is_too_large_or_compressed_is_refused_at_every_door(ask: Ask, project: str) -> None:
    for method, path in every_door(project):
        refused(ask(method, path, b'{"x":"' + b"x" * MIB + b'"}'), 413)
        refused(ask(method, path, gzip.compress(b"[" * 64 * MIB, 1), **{"Content-Encoding": "gzip"}), 415)


@pytest.mark.threat("L01")
@ON_SQLITE
@pytest.mark.parametrize(
    ("body", "encoding"), [(b"x", "identity"), (b"x" * 2 * MIB, "identity"), (b"x", "gzip")]
)
def test_where_no_body_belongs_every_body_is_the_same_mistake(ask: Ask, body: bytes, encoding: str) -> None:
    answer = ask("DELETE", f"/builds/{new_id()}", body, **{"Content-Encoding": encoding})

    assert refused(answer)["details"] == {"body": "must be empty"}


@pytest.mark.threat("L01")
@pytest.mark.threat("L12")
@ON_SQLITE
@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 1073741824",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding: xchunked",
        b"Content-Length: 5\r\n folded: yes",
        b"Content-Length: 5\r\nX: a\x00b",
        b"Content-Length : 5",
        b"Content-Length: 5\r\nHost: another.example",
        b"Content-Length: 5\r\n" + b"X: y\r\n" * 10_000 + b"X: y",
        b"Content-Length: 5\r\nX: " + b"y" * MIB,
    ],
    ids=lambda framing: repr(framing)[:50],
)
def test_a_request_with_two_readings_or_no_end_is_refused_and_not_acted_upon(
    app: Starlette, mill: Mill, headers: dict[str, str], project: str, framing: bytes
) -> None:
    head = [b"POST /api/v1/builds HTTP/1.1", b"Host: 127.0.0.1", b"Content-Type: application/json", framing]
    head += [f"{name}: {value}".encode() for name, value in headers.items()]
    body = json.dumps({"project_id": project, "git_branch": "main"}).encode()
    smuggled = b"\r\n".join(head[:2]) + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with served(app) as server:
        answer = said_raw(server, b"\r\n".join(head) + b"\r\n\r\n" + body + smuggled)

    assert answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 413 ", b"HTTP/1.1 431 ")), answer[:200]
    assert answer.count(b"\r\ndate: ") == 1
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert mill.audited("build.created") == []


def said_raw(server: Served, sent: bytes) -> bytes:
    """What comes back until the other side closes."""
    heard = bytearray()
    with server.raw() as line, contextlib.suppress(ConnectionError):
        with contextlib.suppress(ConnectionError):
            line.sendall(sent)
        while part := line.recv(65536):
            heard += part
    return bytes(heard)


@pytest.mark.threat("L02")
@ON_SQLITE
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[" * 100_000, id="depth"),
        pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, id="objects"),
        pytest.param(b"{" + b",".join(b'"k%d":1' % n for n in range(80_000)) + b"}", id="keys"),
        pytest.param(b'{"git_branch":"' + b"x" * 1_000_000 + b'"}', id="string"),
        pytest.param(b'{"git_branch":' + b"9" * 100_000 + b"}", id="digits"),
        pytest.param(b"[" + b"1," * 400_000 + b"1]", id="values"),
    ],
)
def test_a_body_that_is_costly_to_read_is_refused_quickly(ask: Ask, project: str, body: bytes) -> None:
    for method, path in every_door(project)[:2]:
        begun = time.monotonic()
        refused(ask(method, path, body))
        assert time.monotonic() - begun < 5  # a tenth of a second on an idle machine


# Two readings, and none


@pytest.mark.threat("L03")
@ON_SQLITE
def test_a_field_that_stands_twice_is_refused_by_name(ask: Ask, project: str) -> None:
    for method, path in every_door(project):
        fields = fields_of(path, project)
        name, value = next(iter(fields.items()))
        whole = json.dumps(fields)[:-1]
        in_disguise = f'"\\u{ord(name[0]):04x}{name[1:]}"'
        for again in (json.dumps(name), in_disguise):
            answer = ask(method, path, f"{whole}, {again}: {json.dumps(value)}}}".encode())
            assert name in refused(answer)["details"], path


@pytest.mark.threat("L04")
@ON_SQLITE
@pytest.mark.parametrize(
    "value",
    [
        "NaN",
        "-Infinity",
        "1e999",
        "-0",
        "1.0",
        "true",
        "1",
        "null",
        "[]",
        '["main"]',
        '{"a":"main"}',
        "01",
        "'a'",
    ],
)
def test_only_a_text_is_a_text(ask: Ask, project: str, value: str) -> None:
    for method, path in every_door(project):
        for name in fields_of(path, project):
            if value == "null" and method == "PATCH":
                continue  # there it takes the value away
            others = {one: said for one, said in fields_of(path, project).items() if one != name}
            body = json.dumps(others)[:-1] + (", " if others else "") + f'"{name}": {value}}}'
            refused(ask(method, path, body.encode()))


@pytest.mark.threat("L04")
@ON_SQLITE
@pytest.mark.parametrize("value", ['"true"', "1", "0", "null", "[]", "NaN"])
def test_only_a_truth_is_a_truth(ask: Ask, value: str) -> None:
    refused(ask("POST", "/auth/logout", b'{"everywhere": %s}' % value.encode()))

    assert ask("GET", "/auth/me").status_code == 200


NO_TEXT = [b"\\u0000", b"\\ud800", b"\\udc00\\ud800", b"\xff", b"\xed\xa0\x80", b"\xc0\xaf", b"\x00", b"\x1f"]


@pytest.mark.threat("L05")
@pytest.mark.threat("L06")
@pytest.mark.parametrize("odd", NO_TEXT)
def test_text_that_cannot_be_stored_is_refused_in_every_field(ask: Ask, project: str, odd: bytes) -> None:
    for method, path in every_door(project):
        fields = fields_of(path, project)
        for name in fields:
            marked = json.dumps({**fields, name: "a-PLACE"}).encode()
            refused(ask(method, path, marked.replace(b"PLACE", odd)))
        refused(ask(method, path, json.dumps({**fields, "PLACE": 1}).encode().replace(b"PLACE", odd)))


@pytest.mark.threat("L06")
@ON_SQLITE
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-7"])
def test_a_body_in_another_encoding_is_refused(ask: Ask, project: str, encoding: str) -> None:
    for method, path in every_door(project):
        body = json.dumps({**fields_of(path, project), "ü": "ü"}, ensure_ascii=False).encode(encoding)
        refused(ask(method, path, body))
        refused(ask(method, path, body, **{"Content-Type": f"application/json; charset={encoding}"}), 415)


@pytest.mark.threat("L05")
@pytest.mark.threat("L06")
@pytest.mark.parametrize("odd", ["%00", "%FF", "%ED%A0%80", "%C0%AF"])
def test_bytes_that_are_no_text_are_refused_in_the_query_and_found_nowhere(ask: Ask, odd: str) -> None:
    for path in ("/builds?status=", "/builds?project_id=", "/builds?sort_by=", "/projects?limit="):
        refused(ask("GET", path + odd))
    refused(ask("GET", f"/builds?{odd}=1"))
    for path in ("/builds/{}", "/builds/{}/status", "/builds/{}/logs", "/projects/{}"):
        answer = ask("GET", path.format(odd))
        refused(answer, answer.status_code)
        assert answer.status_code in (400, 404)


@pytest.mark.threat("L06")
@pytest.mark.threat("L16")
@pytest.mark.parametrize(
    "odd", [b"\xff", b"\x00", b"a\r\nX-Made-Up: yes", b"a\nb", b"\xed\xa0\x80", b"", b" "]
)
def test_a_header_that_is_no_text_is_refused_and_reaches_no_header(
    ask: Ask, project: str, odd: bytes
) -> None:
    body = json.dumps({"project_id": project, "git_branch": "main"}).encode()

    for name, status in (("X-Tenant-ID", 400), ("Idempotency-Key", 400), ("Authorization", 401)):
        answer = ask("POST", "/builds", body, **{name: odd})
        refused(answer, status)
        assert "x-made-up" not in answer.headers


@pytest.mark.threat("L16")
@pytest.mark.parametrize("odd", ["a\r\nX-Made-Up: yes", "a\nb", "a\rb", "a\u2028b", "a\x85b"])
def test_a_line_break_in_a_value_is_refused(ask: Ask, mill: Mill, project: str, odd: str) -> None:
    fields = {"project_id": project, "git_branch": odd}
    told = refused(ask("POST", "/builds", json.dumps(fields).encode()))
    assert "git_branch" in told["details"]
    for name in ("default_branch", "repo_url"):
        refused(ask("PATCH", f"/projects/{project}", json.dumps({name: odd}).encode()))
    for body in (b'{"email":%s,"password":"x"}' % json.dumps(odd).encode(),):
        answer = ask("POST", "/auth/login", body)
        refused(answer, answer.status_code)
        assert answer.status_code in (400, 401)
        assert "x-made-up" not in answer.headers


# Logs are bytes


@pytest.mark.threat("L07")
def test_a_log_of_any_bytes_is_shown_as_text(ask: Ask, mill: Mill) -> None:
    held = mill.a_running_step()
    data = b"\x00\xff\xfe\xed\xa0\x80\xc0\xaf\x1b]0;x\x07\r\n" + bytes(range(256)) * 8 + b"\nthe end\n"
    mill.append(held, 0, data)
    mill.complete(held, logSize=len(data))

    as_json = ask("GET", f"/builds/{held.claim.build_id}/logs")
    as_text = ask("GET", f"/builds/{held.claim.build_id}/logs?format=text")

    assert (as_json.status_code, as_text.status_code) == (200, 200)
    messages = [json.loads(line) for line in as_json.content.decode("utf-8").split("\n") if line]
    assert "the end" in [message["message"] for message in messages]
    assert as_text.content == data


# Numbers, pages and ids


@pytest.mark.threat("L08")
@pytest.mark.threat("L09")
@pytest.mark.parametrize(
    "value",
    ["-1", "1000000000000", str(2**31), str(2**63), str(-(2**63) - 1), str(10**30), "9" * 5000, "1;drop", "",
     "1.0", "1e1", "%201", "+1", "0x1", "null", "true", "%D9%A1", "1&{}=1", "0"],
)  # fmt: skip
def test_a_number_that_makes_no_sense_is_refused_or_leads_to_an_empty_page(
    ask: Ask, project: str, value: str
) -> None:
    for path, name in (
        ("/builds", "page"),
        ("/builds", "limit"),
        ("/projects", "page"),
        ("/projects", "limit"),
    ):
        answer = ask("GET", f"{path}?{name}={value.format(name)}")
        if name == "page" and answer.status_code == 200:
            assert answer.json()["builds" if path == "/builds" else "projects"] == []
        else:
            assert name in refused(answer)["details"]
    for path in ("/builds?limit[]=1", "/builds?Limit=1", "/builds?offset=1", "/projects?sort=x"):
        refused(ask("GET", path))


@pytest.mark.threat("L08")
@pytest.mark.parametrize(
    "odd", ["0", "-1", "1" * 30, "null", "*", "00000000-0000-0000-0000-000000000000", "x" * 3000, "%00"]
)
def test_an_id_that_is_none_is_not_found(ask: Ask, odd: str) -> None:
    for method, path in (
        ("GET", "/builds/{}"), ("DELETE", "/builds/{}"), ("POST", "/builds/{}/start"),
        ("POST", "/builds/{}/cancel"), ("POST", "/builds/{}/retry"), ("GET", "/builds/{}/status"),
        ("GET", "/builds/{}/logs"), ("GET", "/projects/{}"),
    ):  # fmt: skip
        refused(ask(method, path.format(odd)), 404)
    refused(ask("PATCH", f"/projects/{odd}", b"{}"), 404)


# Who leaves, and what breaks


@pytest.fixture
def server(app: Starlette) -> Iterator[Served]:
    with served(app) as server:
        yield server


@pytest.mark.threat("L14")
def test_clients_that_leave_at_any_moment_leave_no_transaction_open(
    server: Served, mill: Mill, database: Database, headers: dict[str, str], project: str
) -> None:
    body = json.dumps({"project_id": project, "git_branch": "main"}).encode()
    said = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    requests = [
        f"POST {PREFIX}/builds HTTP/1.1\r\nHost: 127.0.0.1\r\n{said}Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        + body,
        f"GET {PREFIX}/builds HTTP/1.1\r\nHost: 127.0.0.1\r\n{said}\r\n".encode(),
        f"GET {PREFIX}/projects HTTP/1.1\r\nHost: 127.0.0.1\r\n{said}\r\n".encode(),
    ]
    chance = random.Random(14)

    for number in range(300):
        whole = requests[number % len(requests)]
        with server.raw() as line:
            line.sendall(whole[: chance.choice([len(whole), chance.randrange(1, len(whole))])])
            if chance.random() < 0.5:  # a reset, not a polite end
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    until(lambda: not any(mill.state.lanes.waiting.values()), 30)
    until(lambda: busy_connections(database) == 0, 30)
    with server.raw() as line:
        line.sendall(requests[1].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert line.recv(65536).startswith(b"HTTP/1.1 200 ")


def busy_connections(database: Database) -> int:
    """Those that are within a transaction, as Postgres sees them; SQLite would refuse the next writer."""
    if database.is_sqlite:
        return 0
    asked = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND backend_type = 'client backend' AND pid <> pg_backend_pid() AND state <> 'idle'"
    )
    with database.reader.connect() as connection:
        return int(connection.execute(text(asked)).scalar_one())


@pytest.mark.threat("L23")
def test_what_nobody_expected_is_told_by_a_number_alone(ask: Ask, mill: Mill, database: Database) -> None:
    build = mill.a_build()
    with database.writer.begin() as connection:
        connection.execute(text("UPDATE builds SET state = 'martian'"))

    for method, path in (("GET", f"/builds/{build.id}"), ("POST", f"/builds/{build.id}/cancel")):
        with capture_logs() as written:
            answer = ask(method, path)

        told = refused(answer, 500)
        assert (told["code"], told["details"]) == ("INTERNAL_SERVER_ERROR", {})
        assert "martian" not in answer.text
        assert told["trace_id"] in [line.get("trace_id") for line in written]
        assert [line["path"] for line in written if line["event"] == "unexpected"]
    assert ask("GET", "/projects").status_code == 200
