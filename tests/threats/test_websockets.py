"""WebSockets under attack: who may not open one or keep it open, and what may be sent through it."""

import base64
import contextlib
import json
import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import httpx
import pytest
from starlette.applications import Starlette

from coordinator.actions.log_out import log_out
from coordinator.actions.remove_member import remove_member
from coordinator.actions.revoke_token import revoke_token
from coordinator.api.auth import Doorkeeper
from coordinator.api.websockets import Patience
from coordinator.rules.access import Audience, Caller, Policy
from coordinator.rules.retention import Part
from coordinator.settings import Settings
from coordinator.store.retention import mark
from tests.coordinator.live_logs import Served, impatient, served
from tests.factories import LOCAL, ON_SQLITE, Held, Mill, a_step, together
from tests.threats.stack import Stack

SOON = Patience(send_s=5.0, recheck_s=0.3)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Open mode has guards of its own in front of these."""
    return Settings(data=tmp_path / "data", auth="token")


@pytest.fixture
def server(app: Starlette) -> Iterator[Served]:
    with served(app) as server:
        yield server


@pytest.fixture
def quick(app: Starlette) -> Iterator[Served]:
    """One that looks at rights again all the time."""
    with served(impatient(app, SOON)) as server:
        yield server


@pytest.fixture
def held(mill: Mill) -> Held:
    return mill.a_running_step()


@pytest.fixture
def build_id(mill: Mill, held: Held) -> str:
    return str(mill.step(held.step_id).build_id)


def a_ticket(client: httpx.Client, member: dict[str, str], build_id: str) -> str:
    answer = client.post("/api/v1/auth/ws-tickets", json={"build_id": build_id}, headers=member)
    return str(answer.json()["ticket"])


def token_in(headers: dict[str, str]) -> str:
    return headers["Authorization"].removeprefix("Bearer ")


def caller_behind(app: Starlette, headers: dict[str, str]) -> Caller:
    """The caller that these headers make."""
    state = app.state.coordinator
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    policy = Policy(Audience.USER, "account:read")

    async def admit() -> Caller:
        return await Doorkeeper(state).admit(policy, raw, "127.0.0.1", needs_credential=True)

    return anyio.run(admit)


# Who may not open one


@pytest.mark.threat("A22")
def test_a_credential_that_does_not_count_opens_nothing(mill: Mill, server: Served, build_id: str) -> None:
    member, stranger = mill.a_member(), mill.a_member("other")
    later = {**member, "X-Tenant-ID": stranger["X-Tenant-ID"]}

    assert server.refusal(build_id).status == 401
    assert server.refusal(build_id, {**member, "Authorization": "Bearer x.y.z"}).status == 401
    assert server.refusal(build_id, {**member, "Authorization": "Basic eDp5"}).status == 401
    assert server.refusal(build_id, offers=["bearer"], tenant=member["X-Tenant-ID"]).status == 401
    assert server.refusal(build_id, offers=["x", "bearer"], tenant=member["X-Tenant-ID"]).status == 401
    assert server.refusal(build_id, stranger).status == 404
    assert server.refusal(build_id, later).status == 403
    mill.clock.advance(86_400)
    assert server.refusal(build_id, member).status == 401


@pytest.mark.threat("A22")
def test_who_may_do_something_else_opens_nothing(mill: Mill, server: Served, build_id: str) -> None:
    tenant = {"X-Tenant-ID": mill.a_tenant()}

    assert server.refusal(build_id, {**mill.an_api_token("acme", "build:list"), **tenant}).status == 403
    server.open(build_id, {**mill.an_api_token("acme", "build:read"), **tenant}).close()


@ON_SQLITE
@pytest.mark.threat("A23")
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "http://127.0.0.1.evil.example:{port}",
        "http://127.0.0.1:1",
        "http://evil@127.0.0.1:{port}",
        "file://",
        None,
    ],
)
def test_a_cookie_counts_for_our_own_page_only(
    mill: Mill, server: Served, build_id: str, origin: str | None
) -> None:
    member = mill.a_member()
    cookie = {"Cookie": f"buildmill_session={token_in(member)}"}
    said = origin.format(port=server.port) if origin is not None else None

    refused = server.refusal(build_id, cookie, origin=said, tenant=member["X-Tenant-ID"])

    assert (refused.status, refused.body["code"]) == (403, "FORBIDDEN")


@ON_SQLITE
@pytest.mark.threat("A23")
def test_a_cookie_is_no_help_to_another_credential(mill: Mill, server: Served, build_id: str) -> None:
    member = mill.a_member()
    cookie = {"Cookie": f"buildmill_session={token_in(member)}"}
    own = f"http://127.0.0.1:{server.port}"

    assert server.refusal(build_id, {**member, **cookie}, origin=own).status == 400
    twice = {"Cookie": f"buildmill_session={token_in(member)}; buildmill_session=x"}
    assert server.refusal(build_id, twice, origin=own, tenant=member["X-Tenant-ID"]).status == 401


@ON_SQLITE
@pytest.mark.threat("A23")
def test_in_open_mode_no_foreign_page_opens_anything(
    mill: Mill, new_app: Callable[[Settings], Starlette], settings: Settings, build_id: str
) -> None:
    with served(new_app(Settings(data=settings.data))) as server:
        refused = server.refusal(build_id, mill.a_member(), origin="https://evil.example")
        assert refused.status == 403
        assert server.refusal(build_id, {"Host": "evil.example"}).status == 400


@pytest.mark.threat("A24")
def test_nothing_that_a_follower_says_shows_it_another_build(
    mill: Mill, server: Served, held: Held, build_id: str
) -> None:
    mine = mill.a_build(project_id=mill.a_project("other"))
    follower = server.open(mine.id, mill.a_member("other"))
    for wish in ({"build_id": build_id}, {"subscribe": "*"}, {"type": "subscribe", "id": build_id}):
        follower.line.send(json.dumps(wish))
    mill.append(held, 0, b"not yours\n")

    with pytest.raises(TimeoutError):
        follower.line.recv(timeout=2.5)


def test_who_is_refused_stands_in_the_trail(mill: Mill, server: Served, build_id: str) -> None:
    stranger = mill.a_member("other")
    lost = {**stranger, "X-Tenant-ID": mill.a_tenant()}

    server.refusal(build_id)
    server.refusal(build_id, lost)

    rows = [(row.actor.partition(":")[0], row.details) for row in mill.audited("access.denied")]
    path = "/api/v1/builds/{id}/logs/stream"
    assert [(actor, said["path"], said["status"]) for actor, said in rows] == [
        ("unknown", path, 401),
        ("user", path, 403),
    ]


# Tickets


@pytest.mark.threat("A25")
def test_a_ticket_counts_once_and_soon_and_for_its_build_alone(
    mill: Mill, server: Served, client: httpx.Client, build_id: str
) -> None:
    member = mill.a_member()
    other_build = mill.a_build().id
    used, misused, old = (a_ticket(client, member, build_id) for _ in range(3))

    server.open(build_id, ticket=used).close()
    assert server.refusal(build_id, ticket=used).status == 401
    assert server.refusal(other_build, ticket=misused).status == 401
    assert server.refusal(build_id, ticket=misused).status == 401
    assert server.refusal(build_id, ticket="x").status == 401
    assert server.refusal(build_id, member, ticket=a_ticket(client, member, build_id)).status == 400
    mill.clock.advance(30)
    assert server.refusal(build_id, ticket=old).status == 401


@pytest.mark.threat("A25")
def test_of_many_who_show_the_same_ticket_one_comes_in(
    mill: Mill, server: Served, client: httpx.Client, build_id: str
) -> None:
    ticket = a_ticket(client, mill.a_member(), build_id)
    barrier = threading.Barrier(8)
    came: list[str] = []

    def come() -> None:
        barrier.wait(20)
        with contextlib.suppress(Exception):
            server.open(build_id, ticket=ticket)
            came.append("in")

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert came == ["in"]


@pytest.mark.threat("A25")
def test_a_ticket_is_worth_no_more_than_the_credential_behind_it(
    app: Starlette, mill: Mill, server: Served, client: httpx.Client, build_id: str
) -> None:
    member = mill.a_member()
    ticket = a_ticket(client, member, build_id)
    mill.now(log_out, caller_behind(app, member), everywhere=False)
    mill.state.rights.have_changed()

    assert server.refusal(build_id, ticket=ticket).status == 401


@ON_SQLITE
@pytest.mark.threat("A25")
def test_a_ticket_is_written_into_no_log(
    mill: Mill, server: Served, client: httpx.Client, build_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    ticket = a_ticket(client, mill.a_member(), build_id)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)

    server.open(build_id, ticket=ticket).close()
    server.refusal(build_id, ticket=ticket)

    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    assert ticket not in caplog.text


# Who may not keep it open


@pytest.mark.threat("A22")
def test_who_logs_out_is_closed(app: Starlette, mill: Mill, quick: Served, build_id: str) -> None:
    member = mill.a_member()
    follower = quick.open(build_id, member)

    mill.now(log_out, caller_behind(app, member), everywhere=False)
    mill.state.rights.have_changed()

    assert follower.rest() == ([], 4401)


@pytest.mark.threat("A22")
def test_who_loses_the_role_is_closed(app: Starlette, mill: Mill, quick: Served, build_id: str) -> None:
    member = mill.a_member(role="viewer")
    follower = quick.open(build_id, member)
    user_id = caller_behind(app, member).user_id

    mill.now(remove_member, LOCAL, member["X-Tenant-ID"], user_id)
    mill.state.rights.have_changed()

    assert follower.rest() == ([], 4403)


@pytest.mark.threat("A22")
@pytest.mark.parametrize("what", ["login", "role", "build"])
def test_who_follows_a_step_by_events_sees_the_end_of_it(
    app: Starlette, mill: Mill, server: Served, held: Held, build_id: str, what: str
) -> None:
    member = mill.a_member(role="viewer")
    caller = caller_behind(app, member)
    mill.append(held, 0, b"one\n")
    url = f"http://127.0.0.1:{server.port}/api/steps/{held.step_id}/log"

    with httpx.stream("GET", url, params={"follow": "true"}, headers=member, timeout=20) as answer:
        lines = answer.iter_lines()
        seen = [next(lines) for _ in range(3)]
        if what == "login":
            mill.now(log_out, caller, everywhere=False)
        elif what == "role":
            mill.now(remove_member, LOCAL, member["X-Tenant-ID"], caller.user_id)
        else:
            mill.now(mark, [build_id], Part.BUILD)
        mill.state.rights.have_changed()
        mill.append(held, 4, b"two\n")
        rest = list(lines)

    assert "one" in seen[2]
    assert not any("two" in line or "event: end" in line for line in rest), "ended at once, and whole"


def test_who_follows_a_build_that_is_deleted_is_closed(mill: Mill, server: Served, build_id: str) -> None:
    follower = server.open(build_id, mill.a_member())

    mill.now(mark, [build_id], Part.BUILD)

    assert follower.rest() == ([], 4404)


@pytest.mark.threat("A22")
def test_a_token_that_is_called_back_is_closed(
    app: Starlette, mill: Mill, quick: Served, build_id: str
) -> None:
    token = {**mill.an_api_token("acme", "build:read"), "X-Tenant-ID": mill.a_tenant()}
    follower = quick.open(build_id, token)
    token_id = caller_behind(app, token).credential.removeprefix("token:")

    mill.now(revoke_token, LOCAL, token_id)
    mill.state.rights.have_changed()

    assert follower.rest() == ([], 4401)


@pytest.mark.threat("A22")
def test_who_keeps_every_right_is_not_closed(mill: Mill, quick: Served, held: Held, build_id: str) -> None:
    follower = quick.open(build_id, mill.a_member())
    time.sleep(1.0)  # it was looked at several times

    mill.append(held, 0, b"still here\n")

    assert follower.take(1) == ["still here"]


@pytest.mark.threat("A22")
@pytest.mark.parametrize("way", ["token", "ticket"])
def test_a_credential_that_expires_is_closed_at_that_moment(
    app: Starlette, mill: Mill, client: httpx.Client, build_id: str, way: str
) -> None:
    member = mill.a_member()
    expires_at = caller_behind(app, member).expires_at
    assert expires_at is not None
    mill.clock.advance((expires_at - mill.clock()).total_seconds() - 1.5)
    with served(impatient(app, Patience(recheck_s=600))) as server:
        if way == "ticket":
            follower = server.open(build_id, ticket=a_ticket(client, member, build_id))
        else:
            follower = server.open(build_id, member)
        mill.clock.advance(1.5)
        begun = time.monotonic()

        assert follower.rest() == ([], 4401)

        assert time.monotonic() - begun < 15


# What may be sent through it


def a_handshake(path: str, headers: dict[str, str], **changed: str | None) -> bytes:
    key = base64.b64encode(os.urandom(16)).decode()
    lines = {
        "Host": "localhost",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": key,
        **headers,
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    told = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"GET {path} HTTP/1.1\r\n{told}\r\n".encode()


def a_frame(opcode: int, data: bytes = b"", *, is_masked: bool = True, is_last: bool = True) -> bytes:
    size = len(data)
    first = (0x80 if is_last else 0) | opcode
    mask = 0x80 if is_masked else 0
    if size < 126:
        head = bytes((first, mask | size))
    elif size < 2**16:
        head = bytes((first, mask | 126)) + struct.pack("!H", size)
    else:
        head = bytes((first, mask | 127)) + struct.pack("!Q", size)
    return head + (b"\0\0\0\0" if is_masked else b"") + data


@contextlib.contextmanager
def an_open_line(server: Served, build_id: str, member: dict[str, str]) -> Iterator[socket.socket]:
    """A WebSocket whose frames are made by hand."""
    with server.raw() as line:
        line.sendall(a_handshake(server.path(build_id), member))
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += line.recv(4096)
        assert answer.startswith(b"HTTP/1.1 101 "), answer
        yield line


def code_of_end(line: socket.socket) -> int:
    """The code by which the server closes, read from its last frame."""
    said = b""
    with contextlib.suppress(OSError):
        while part := line.recv(65536):
            said += part
    at = said.rfind(b"\x88")
    assert at >= 0, said[:100]
    return int.from_bytes(said[at + 2 : at + 4], "big")


BAD_FRAMES = {
    "no mask": (a_frame(1, b"hello", is_masked=False), 1002),
    "a long ping": (a_frame(9, b"x" * 126), 1002),
    "a ping in parts": (a_frame(9, b"x", is_last=False), 1002),
    "an unknown opcode": (a_frame(3, b"x"), 1002),
    "reserved bits": (a_frame(0x71, b"x"), 1002),
    "a part of nothing": (a_frame(0, b"x"), 1002),
    "no UTF-8": (a_frame(1, b"\xff\xfe"), 1007),
    "a large message": (a_frame(2, b"x" * (64 * 1024 + 1)), 1009),
    "a message of a terabyte": (b"\x82\xff" + struct.pack("!Q", 2**40) + b"\0\0\0\0", 1009),
    "a large message in parts": (
        a_frame(2, b"x" * 40_000, is_last=False) + a_frame(0, b"x" * 40_000),
        1009,
    ),
    "endless empty parts": (a_frame(2, is_last=False) + a_frame(0, is_last=False) * 5000, 1008),
    "a flood of pings": (a_frame(9, b"x") * 5000, 1008),
    "a flood of pongs": (a_frame(10) * 5000, 1008),
    "a flood of messages": (a_frame(1, b"x") * 5000, 1008),
    "a bad word at the end": (a_frame(8, b"\x00"), 1002),
}


@ON_SQLITE
@pytest.mark.threat("L19")
@pytest.mark.threat("F06")
@pytest.mark.parametrize("name", BAD_FRAMES)
def test_a_bad_frame_is_answered_by_its_code(mill: Mill, server: Served, build_id: str, name: str) -> None:
    sent, code = BAD_FRAMES[name]
    with an_open_line(server, build_id, mill.a_member()) as line:
        with contextlib.suppress(ConnectionError):
            line.sendall(sent)

        assert code_of_end(line) == code


@pytest.mark.threat("L19")
@pytest.mark.threat("F06")
def test_floods_from_who_reads_nothing_take_no_memory(stack: Stack) -> None:
    build = stack.submit([a_step(labels=["nobody-has-this"])])
    token = (stack.folder / "data" / "keys" / "admin-token").read_text().strip()
    operator = {"Authorization": f"Bearer {token}"}
    account = stack.http.get(f"/api/projects/{build['projectId']}").json()["accountId"]
    tenants = stack.http.get("/api/tenants", headers=operator).json()
    tenant = next(one["id"] for one in tenants if one["accountId"] == account)
    member = {**operator, "X-Tenant-ID": tenant}
    server = Served(stack.port, lambda: None, contextlib.ExitStack())
    before = stack.coordinator.resident_bytes
    stack.coordinator.forget_peak()

    for flood in (
        a_frame(9, b"x" * 125),
        a_frame(1, b"x"),
        a_frame(2, is_last=False) + a_frame(0, is_last=False),
    ):
        for _ in range(5):
            with an_open_line(server, build["id"], member) as line, contextlib.suppress(OSError):
                line.settimeout(5)
                for _ in range(20):
                    line.sendall(flood * 1000)

    assert stack.coordinator.peak_bytes - before < 32 * 1024 * 1024
    stack.cancel(build["id"])


@ON_SQLITE
@pytest.mark.threat("L19")
def test_a_few_frames_are_ignored(mill: Mill, server: Served, held: Held, build_id: str) -> None:
    follower = server.open(build_id, mill.a_member())
    for _ in range(20):
        follower.line.send("hello")
        follower.line.send(b"hello")
    follower.line.ping().wait(10)

    mill.append(held, 0, b"one\n")

    assert follower.take(1) == ["one"]


@ON_SQLITE
@pytest.mark.threat("L19")
@pytest.mark.parametrize(
    ("path", "changed", "status"),
    [
        ("/api/v1/builds", {}, 404),
        ("/api/builds", {}, 404),
        ("/healthz", {}, 404),
        ("/nowhere", {}, 404),
        ("/api/v1/builds/x/logs/stream/", {}, 404),
        ("/api/v1/builds/%2e%2e/logs/stream", {}, 404),
        ("//api/v1/builds/x/logs/stream", {}, 404),
        (None, {"Sec_WebSocket_Key": None}, 400),
        (None, {"Sec_WebSocket_Key": "short"}, 400),
        (None, {"Sec_WebSocket_Version": "12"}, 400),
        (None, {"Sec_WebSocket_Version": None}, 400),
        (None, {"X_Long": "x" * 9000}, 400),
        (None, {"Content_Length": "5"}, 400),
        (None, {"Connection": "keep-alive"}, 400),
        (None, {"Upgrade": "h2c"}, 400),
        (None, {"Host": None}, 400),
    ],
)
def test_a_handshake_that_is_none_is_refused(
    mill: Mill, server: Served, build_id: str, path: str | None, changed: dict[str, str | None], status: int
) -> None:
    with server.raw() as line:
        line.sendall(a_handshake(path or server.path(build_id), mill.a_member(), **changed))

        answer = line.recv(65536)

    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:300]
    assert b"application/json" in answer


@ON_SQLITE
@pytest.mark.threat("L19")
def test_bytes_that_are_no_text_in_the_target_are_refused(server: Served) -> None:
    with server.raw() as line:
        line.sendall(a_handshake("/PLACE", {}).replace(b"PLACE", b"\xff\xfe?\xff"))
        answer = line.recv(65536)

    assert answer == b"" or answer.startswith(b"HTTP/1.1 400 "), answer[:300]


@ON_SQLITE
@pytest.mark.threat("F06")
def test_many_at_once_are_as_many_as_one_by_one(app: Starlette, mill: Mill, build_id: str) -> None:
    with served(impatient(app, SOON, most_open=3)) as server:
        member = mill.a_member()

        opened = together(*[lambda: server.open(build_id, member)] * 12)

        assert sum(not isinstance(one, Exception) for one in opened) == 3


@ON_SQLITE
@pytest.mark.threat("F06")
def test_one_user_opens_only_so_many(app: Starlette, mill: Mill, build_id: str) -> None:
    with served(impatient(app, SOON, most_open=3)) as server:
        member, other = mill.a_member(), mill.a_member()
        opened = [server.open(build_id, member) for _ in range(3)]

        refused = server.refusal(build_id, member)
        assert (refused.status, refused.body["code"]) == (429, "RATE_LIMITED")
        server.open(build_id, other)
        opened[0].close()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):
                server.open(build_id, member)
                return
        raise AssertionError("the place of who has left stays taken")
