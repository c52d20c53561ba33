"""One principal has so many requests a minute, whatever it does to look like several."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import pytest
from starlette.applications import Starlette
from starlette.types import Message, Receive, Scope, Send

from coordinator.api.auth import Doorkeeper
from coordinator.api.executions.problems import executions_form
from coordinator.api.identify import Identity
from coordinator.api.problems import refusal_of
from coordinator.api.rate_limit import RateLimited, Windows, count_for, is_below
from coordinator.errors import TooMany
from coordinator.settings import Settings
from shared.ids import new_id
from tests.factories import ON_SQLITE, Mill, a_spec
from tests.fakes import MORNING, SettableClock, a_scope, carry

PATH = b"/api/v1/auth/me"
HOST = (b"host", b"localhost:3000")


@dataclass
class Told:
    """What an answer said of the limit."""

    status: int
    limit: int | None
    remaining: int | None
    reset: int | None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass
class Asker:
    """Sends requests to an application as exactly these bytes."""

    app: Starlette
    mill: Mill

    async def ask(
        self,
        raw_path: bytes = PATH,
        *,
        method: str = "GET",
        headers: dict[str, str] | None = None,
        peer: str = "127.0.0.1",
        more: list[tuple[bytes, bytes]] | None = None,
        body: bytes = b"",
    ) -> Told:
        sent = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        path, _, query = raw_path.partition(b"?")
        scope = a_scope(method, path, query=query, headers=[HOST, *sent, *(more or [])])
        scope["client"] = (peer, 50000)
        status, answered, content = await carry(self.app, scope, body)
        said = {name.decode().lower(): value.decode() for name, value in answered}

        def number(name: str) -> int | None:
            return int(said[name]) if name in said else None

        names = ("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset")
        return Told(status, *(number(name) for name in names), said, content)


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"rate_limit": 5, "rate_limit_peer": 3})


@pytest.fixture
def asker(app: Starlette, mill: Mill) -> Asker:
    return Asker(app, mill)


async def test_every_answer_says_how_many_requests_are_left_and_until_when(asker: Asker) -> None:
    ann = asker.mill.a_member()

    told = [await asker.ask(headers=ann) for _ in range(6)]

    assert [one.status for one in told] == [200] * 5 + [429]
    assert [one.limit for one in told] == [5] * 6
    assert [one.remaining for one in told] == [4, 3, 2, 1, 0, 0]
    assert {one.reset for one in told} == {int(MORNING.timestamp()) + 60}


async def test_the_refusal_has_the_form_of_the_surface_and_says_when_to_come_back(
    asker: Asker, clock: SettableClock
) -> None:
    ann = asker.mill.a_member()
    await asker.ask(headers=ann)
    clock.advance(12.5)
    for _ in range(4):
        await asker.ask(headers=ann)

    refused = await asker.ask(headers=ann)

    assert refused.status == 429
    assert refused.headers["retry-after"] == "48"
    assert b'"code": "RATE_LIMITED"' in refused.body
    assert b'"trace_id"' in refused.body
    clock.advance(47)
    assert (await asker.ask(headers=ann)).status == 429
    clock.advance(1)
    assert (await asker.ask(headers=ann)).remaining == 4


@ON_SQLITE
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", b"/api/v1/nothing", 404),
        ("GET", b"/api/v1", 404),
        ("DELETE", b"/api/v1/auth/me", 405),
        ("GET", b"/api/v1/auth/me", 401),
        ("HEAD", b"/api/v1/auth/me", 405),
        ("OPTIONS", b"/api/v1/auth/me", 405),
        ("POST", b"/api/v1/auth/login", 415),
        ("GET", b"/api/v1//auth/me", 404),
        ("GET", b"/API/v1/auth/me", 404),
        ("GET", b"/api/v1/auth/me%00", 404),
        ("GET", b"/api/v1/auth/me?tenant=%ff", 401),
    ],
)
async def test_errors_carry_the_headers_too(asker: Asker, method: str, path: bytes, status: int) -> None:
    told = await asker.ask(path, method=method)

    assert (told.status, told.limit, told.remaining) == (status, 3, 2)
    assert told.reset is not None


@ON_SQLITE
async def test_refusals_of_the_host_and_of_the_origin_carry_the_headers_too(asker: Asker) -> None:
    host = await asker.ask(more=[HOST])
    origin = await asker.ask(more=[(b"origin", b"https://evil.example")])

    assert [host.status, origin.status] == [400, 403]
    assert [host.remaining, origin.remaining] == [2, 1]


@ON_SQLITE
async def test_other_surfaces_are_not_counted(asker: Asker) -> None:
    told = [await asker.ask(path) for path in (b"/api/projects", b"/healthz", b"/api/v10/x")]

    assert [one.limit for one in told] == [None, None, None]
    assert (await asker.ask()).remaining == 2


@ON_SQLITE
async def test_no_limit_is_said_by_no_header(
    new_app: Callable[[Settings], Starlette], settings: Settings
) -> None:
    app = new_app(settings.model_copy(update={"rate_limit": 0, "rate_limit_peer": 0}))

    told = [await Asker(app, Mill(app.state.coordinator, SettableClock())).ask() for _ in range(10)]

    assert {(one.status, one.limit, one.reset) for one in told} == {(401, None, None)}


# Getting around it


@pytest.mark.threat("L22")
async def test_many_logins_and_tokens_of_a_user_are_one_user(asker: Asker) -> None:
    ann = asker.mill.a_user(acme="owner")
    logins = [asker.mill.a_login(ann) for _ in range(5)]

    assert [(await asker.ask(headers=login)).status for login in logins] == [200] * 5
    assert (await asker.ask(headers=asker.mill.a_login(ann), peer="198.51.100.9")).status == 429


@pytest.mark.threat("L22")
async def test_one_user_does_not_use_up_what_another_one_has(asker: Asker) -> None:
    ann, bob = asker.mill.a_member(), asker.mill.a_member()
    for _ in range(9):
        await asker.ask(headers=ann)

    assert (await asker.ask(headers=bob)).remaining == 4
    assert (await asker.ask(headers=asker.mill.operator)).remaining == 4
    assert (await asker.ask(headers=asker.mill.an_api_token("acme", "build:read"))).remaining == 4
    assert (await asker.ask()).remaining == 2


@ON_SQLITE
@pytest.mark.threat("L22")
@pytest.mark.parametrize(
    "name",
    [
        "X-Forwarded-For",
        "X-Real-IP",
        "Forwarded",
        "X-Client-IP",
        "CF-Connecting-IP",
        "User-Agent",
        "X-Tenant-ID",
    ],
)
async def test_no_header_makes_another_caller(asker: Asker, name: str) -> None:
    told = [await asker.ask(headers={name: f"192.0.2.{number}"}) for number in range(5)]

    assert [one.remaining for one in told] == [2, 1, 0, 0, 0]
    assert told[-1].status == 429


@ON_SQLITE
@pytest.mark.threat("L22")
async def test_credentials_that_do_not_count_make_no_other_caller(asker: Asker) -> None:
    guesses = ["Bearer a", "Bearer b.c.d", f"Bearer bmt_{'x' * 40}", "Basic YTpi", "Bearer"]

    told = [await asker.ask(headers={"Authorization": guess}) for guess in guesses]

    assert [one.status for one in told] == [401, 401, 401, 429, 429]


@ON_SQLITE
@pytest.mark.threat("L22")
async def test_all_addresses_of_a_network_are_one_peer(asker: Asker) -> None:
    told = [await asker.ask(peer=f"2001:db8:0:7:{number:x}::1") for number in range(1, 6)]

    assert [one.status for one in told] == [401, 401, 401, 429, 429]
    assert (await asker.ask(peer="2001:db8:0:8::1")).remaining == 2
    assert (await asker.ask(peer="::ffff:192.0.2.1")).remaining == 2
    assert (await asker.ask(peer="192.0.2.1")).remaining == 1


@ON_SQLITE
@pytest.mark.threat("L22")
@pytest.mark.parametrize(
    "path",
    [
        b"/api/v1/auth/me",
        b"/API/V1/auth/me",
        b"/Api/v1",
        b"//api/v1/auth/me",
        b"/api//v1///auth/me",
        b"/api/./v1/auth/me",
        b"/x/../api/v1/auth/me",
        b"/%61pi/v1/auth/me",
        b"/api/v1/",
        b"/api%2fv1/auth/me",
    ],
)
async def test_every_spelling_of_a_path_counts(asker: Asker, path: bytes) -> None:
    told = [await asker.ask(path) for _ in range(4)]

    assert [one.remaining for one in told] == [2, 1, 0, 0]
    assert told[-1].status == 429


@ON_SQLITE
@pytest.mark.threat("L22")
async def test_every_method_counts(asker: Asker) -> None:
    methods = ["GET", "HEAD", "OPTIONS", "POST"]

    told = [await asker.ask(method=method) for method in methods]

    assert [one.remaining for one in told] == [2, 1, 0, 0]
    assert told[-1].status == 429


@ON_SQLITE
@pytest.mark.threat("L22")
async def test_denied_and_malformed_requests_of_a_user_are_its_own(asker: Asker) -> None:
    ann = asker.mill.a_member()

    await asker.ask(b"/api/v1/nothing", headers=ann)
    await asker.ask(b"/api/v1//x", headers=ann)
    await asker.ask(headers={**ann, "X-Tenant-ID": "nonsense"})

    assert (await asker.ask(headers=ann)).remaining == 1
    assert (await asker.ask()).remaining == 2


# A WebSocket, whose credential may stand elsewhere


class Upgrade:
    """A WebSocket as the server hands it to an application that does `what` with it."""

    def __init__(self, mill: Mill, what: Callable[[Scope], Message]) -> None:
        async def accept(scope: Scope, _receive: Receive, send: Send) -> None:
            await send(what(scope))

        self.state = mill.state
        self.app = RateLimited(
            accept,
            prefix="/api/v1",
            state=mill.state,
            identities=Doorkeeper(mill.state).identities,
            form=executions_form,
        )

    async def open(self, headers: dict[str, str] | None = None) -> Message:
        sent = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope = a_scope("GET", b"/api/v1/builds/x/logs/stream", headers=sent)
        scope |= {"type": "websocket", "scheme": "ws", "extensions": {"websocket.http.response": {}}}
        said: list[Message] = []

        async def receive() -> Message:
            return {"type": "websocket.connect"}

        async def send(message: Message) -> None:
            said.append(message)

        await self.app(scope, receive, send)
        return said[0]


def remaining(message: Message) -> int:
    return int(dict(message["headers"])[b"x-ratelimit-remaining"])


def taken(_scope: Scope) -> Message:
    return {"type": "websocket.accept"}


@pytest.mark.threat("L22")
async def test_a_websocket_is_counted_and_refused_before_it_is_accepted(mill: Mill) -> None:
    ann = mill.a_member()
    upgrade = Upgrade(mill, taken)

    opened = [await upgrade.open(ann) for _ in range(6)]

    assert [one["type"] for one in opened[:5]] == ["websocket.accept"] * 5
    assert [remaining(one) for one in opened] == [4, 3, 2, 1, 0, 0]
    assert opened[5]["type"] == "websocket.http.response.start"
    assert opened[5]["status"] == 429


@ON_SQLITE
@pytest.mark.threat("L22")
async def test_who_shows_a_ticket_is_counted_as_who_it_was_given_to(mill: Mill) -> None:
    ann = Identity("user:ann", "login:1", new_id(), {})

    def take_ticket(scope: Scope) -> Message:
        count_for(scope, mill.state, ann)
        return {"type": "websocket.accept"}

    upgrade = Upgrade(mill, take_ticket)

    assert [remaining(await upgrade.open()) for _ in range(5)] == [4, 3, 2, 1, 0]
    with pytest.raises(TooMany) as refused:
        await upgrade.open()
    assert refusal_of(refused.value).headers["Retry-After"] == "60"


@ON_SQLITE
async def test_who_was_counted_by_its_header_is_not_counted_again(mill: Mill) -> None:
    def look_again(scope: Scope) -> Message:
        count_for(scope, mill.state, Identity("user:bob", "login:2", new_id(), {}))
        return {"type": "websocket.accept"}

    upgrade, ann = Upgrade(mill, look_again), mill.a_member()

    assert [remaining(await upgrade.open(ann)) for _ in range(2)] == [4, 3]


@pytest.mark.threat("L22")
@pytest.mark.parametrize("way", ["Authorization", "bearer", "ticket", "cookie"])
async def test_a_live_log_is_counted_for_its_user_in_whichever_way_it_is_opened(
    app: Starlette, asker: Asker, way: str
) -> None:
    ann, build = asker.mill.a_member(), asker.mill.a_build(a_spec()).id
    token, tenant = ann["Authorization"].partition(" ")[2], ann["X-Tenant-ID"]
    path = f"/api/v1/builds/{build}/logs/stream"
    scope = a_scope("GET", path.encode(), headers=[HOST])
    scope |= {"type": "websocket", "scheme": "ws", "subprotocols": []}
    if way == "Authorization":
        scope["headers"] += [(name.lower().encode(), value.encode()) for name, value in ann.items()]
    elif way == "bearer":
        scope |= {"subprotocols": ["bearer", token], "query_string": f"tenant={tenant}".encode()}
    elif way == "cookie":
        scope["headers"] += [(b"cookie", f"buildmill_session={token}".encode())]
        scope["headers"] += [(b"origin", b"http://localhost:3000")]
        scope["query_string"] = f"tenant={tenant}".encode()
    else:
        body = json.dumps({"build_id": build}).encode()
        kind = [(b"content-type", b"application/json")]
        made = await asker.ask(b"/api/v1/auth/ws-tickets", method="POST", headers=ann, more=kind, body=body)
        scope["query_string"] = b"ticket=" + json.loads(made.body)["ticket"].encode()
    before = (await asker.ask(headers=ann)).remaining
    asked: list[Message] = [{"type": "websocket.disconnect", "code": 1000}, {"type": "websocket.connect"}]
    said: list[Message] = []

    async def receive() -> Message:
        return asked.pop()

    async def send(message: Message) -> None:
        said.append(message)

    await app(scope, receive, send)

    assert said[0]["type"] == "websocket.accept"
    assert before is not None
    assert remaining(said[0]) == before - 1
    assert (await asker.ask(peer="127.0.0.1")).remaining == 2


# The windows


def test_a_flood_of_strangers_takes_bounded_memory() -> None:
    windows = Windows(most=100)

    for number in range(1000):
        windows.take(f"peer {number}", limit=3, now=MORNING)

    assert len(windows) == 100


def test_windows_that_have_ended_are_let_go() -> None:
    windows = Windows()
    for number in range(50):
        windows.take(f"peer {number}", limit=3, now=MORNING + timedelta(seconds=number))

    windows.take("one more", limit=3, now=MORNING + timedelta(seconds=70))

    assert len(windows) == 40


def test_who_goes_on_asking_in_vain_does_not_wait_longer_for_it() -> None:
    windows = Windows()
    for _ in range(1000):
        standing = windows.take("one", limit=3, now=MORNING)

    assert standing.ends_at == MORNING + timedelta(minutes=1)
    assert not windows.take("one", limit=3, now=standing.ends_at).is_exceeded


@pytest.mark.parametrize("path", ["/api/v1", "/api/v1/", "/API/v1/x", "//api//v1/x", "/a/../api/v1"])
def test_what_is_below_the_prefix_in_some_spelling_is_below_it(path: str) -> None:
    assert is_below("/api/v1", path)


@pytest.mark.parametrize("path", ["/api", "/api/v10", "/api/v1x", "/x/api/v1", "/", "", "/api/v1/../v2"])
def test_what_is_not_below_the_prefix_is_not(path: str) -> None:
    assert not is_below("/api/v1", path)
