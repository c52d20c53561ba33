"""A live log: every line of a build as a WebSocket message, from a position to the end of the build."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from coordinator.api.executions import log_feed
from coordinator.api.websockets import Patience
from tests.coordinator.live_logs import Served, impatient, served
from tests.factories import ON_SQLITE, Held, Mill, a_spec


@pytest.fixture
def server(app: Starlette) -> Iterator[Served]:
    with served(app) as server:
        yield server


@pytest.fixture
def held(mill: Mill) -> Held:
    return mill.a_running_step()


def build_of(mill: Mill, held: Held) -> str:
    return str(mill.step(held.step_id).build_id)


def a_ticket(client: httpx.Client, member: dict[str, str], build_id: str) -> str:
    answer = client.post("/api/v1/auth/ws-tickets", json={"build_id": build_id}, headers=member)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["ticket"])


def test_a_follower_gets_what_was_said_and_what_is_said_and_the_end(
    mill: Mill, server: Served, held: Held
) -> None:
    build_id = build_of(mill, held)
    mill.append(held, 0, b"one\n")
    follower = server.open(build_id, mill.a_member())
    assert follower.take(1) == ["one"]

    mill.append(held, 4, b"two\nthr")
    assert follower.take(1) == ["two"]
    mill.append(held, 11, b"ee\nfour")
    mill.complete(held, logSize=18)

    rest, code = follower.rest()
    assert ([message["message"] for message in rest], code) == (["three", "four"], 1000)


def test_a_message_is_the_same_as_over_http(
    mill: Mill, server: Served, client: httpx.Client, held: Held
) -> None:
    build_id, member = build_of(mill, held), mill.a_member()
    mill.append(held, 0, b"one\n[buildmill] warning: two\n\xff\n" + b"x" * 70_000 + b"\nend")
    mill.complete(held, logSize=mill.step(held.step_id).log_size)

    seen, _ = server.open(build_id, member).rest()

    lines = client.get(f"/api/v1/builds/{build_id}/logs", headers=member).text.splitlines()
    assert [httpx.Response(200, text=line).json() for line in lines] == seen
    assert len(seen) == 6


def test_an_append_over_http_reaches_a_follower_at_once(
    mill: Mill, server: Served, client: httpx.Client, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_feed, "POLL_S", 600.0)  # the bell alone
    follower = server.open(build_of(mill, held), mill.a_member())
    proof = {"X-Attempt": str(held.claim.attempt), "X-Lease": held.claim.lease}
    runner = {**proof, "Authorization": f"Bearer {held.runner.secret}"}
    address = f"http://127.0.0.1:{server.port}/api/runner/{held.step_id}/log"
    time.sleep(0.5)  # so that the feed waits by now

    httpx.post(f"{address}?offset=0", content=b"one\n", headers=runner, trust_env=False).raise_for_status()

    assert follower.take(1) == ["one"]


def test_a_follower_goes_on_behind_the_last_message_it_has_seen(
    mill: Mill, server: Served, held: Held
) -> None:
    build_id, member = build_of(mill, held), mill.a_member()
    mill.append(held, 0, b"one\ntwo\nthree\n")
    follower = server.open(build_id, member)
    follower.take(1)
    seen = follower.next()["metadata"]["seq"]
    follower.close()
    mill.append(held, 14, b"four\n")
    mill.complete(held, logSize=19)

    rest, code = server.open(build_id, member, from_=seen).rest()

    assert ([message["message"] for message in rest], code) == (["three", "four"], 1000)


def test_who_follows_a_build_that_has_not_begun_waits_for_it(mill: Mill, server: Served) -> None:
    build = mill.a_build(a_spec(a=[]))
    follower = server.open(build.id, mill.a_member())

    (held,) = mill.acquire(mill.a_runner())
    mill.append(held, 0, b"begun\n")

    assert follower.take(1) == ["begun"]


def test_followers_that_join_late_or_fall_behind_get_every_line_once(
    mill: Mill, server: Served, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_feed, "RING_BYTES", 4096)
    build_id, member = build_of(mill, held), mill.a_member()
    followers = [server.open(build_id, member)]
    size, said = 0, []
    for number in range(40):
        lines = [f"{number}.{line} {'x' * 50}" for line in range(25)]
        said += lines
        size = mill.append(held, size, "".join(f"{line}\n" for line in lines).encode()).size
        if number % 10 == 5:
            followers.append(server.open(build_id, member))
    mill.complete(held, logSize=size)

    for follower in followers:
        rest, code = follower.rest()
        assert [message["message"] for message in rest] == said
        assert code == 1000


@ON_SQLITE
def test_who_begins_at_the_start_together_shares_the_reading(
    mill: Mill, server: Served, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_id, member = build_of(mill, held), mill.a_member()
    mill.append(held, 0, b"x" * 999 + b"\n")
    for number in range(1, 20):
        mill.append(held, number * 50_000 - 49_000, (b"y" * 999 + b"\n") * 50)
    size = mill.step(held.step_id).log_size
    read, taken = mill.site.logs.read, []

    def count(path: Path, offset: int, length: int) -> bytes:
        data = read(path, offset, length)
        taken.append(len(data))
        return data

    monkeypatch.setattr(mill.site.logs, "read", count)
    followers = [server.open(build_id, member) for _ in range(10)]
    mill.complete(held, logSize=size)

    for follower in followers:
        rest, code = follower.rest()
        assert (len(rest), code) == (951, 1000)

    assert sum(taken) < 3 * size


# Who may


def test_a_token_may_come_as_a_subprotocol_with_the_tenant_in_the_query(
    mill: Mill, server: Served, held: Held
) -> None:
    member = mill.a_member()
    token = member["Authorization"].removeprefix("Bearer ")
    mill.append(held, 0, b"one\n")

    follower = server.open(build_of(mill, held), offers=["bearer", token], tenant=member["X-Tenant-ID"])

    assert follower.line.subprotocol == "bearer"
    assert follower.take(1) == ["one"]


def test_a_ticket_opens_its_log(mill: Mill, server: Served, client: httpx.Client, held: Held) -> None:
    build_id = build_of(mill, held)
    mill.append(held, 0, b"one\n")
    mill.complete(held, logSize=4)

    follower = server.open(build_id, ticket=a_ticket(client, mill.a_member(), build_id))

    rest, code = follower.rest()
    assert ([message["message"] for message in rest], code) == (["one"], 1000)


def test_the_cookie_of_our_own_page_opens_a_log(mill: Mill, server: Served, held: Held) -> None:
    member = mill.a_member()
    cookie = {"Cookie": "x=1; buildmill_session=" + member["Authorization"].removeprefix("Bearer ")}
    mill.append(held, 0, b"one\n")
    own = f"http://127.0.0.1:{server.port}"

    follower = server.open(build_of(mill, held), cookie, origin=own, tenant=member["X-Tenant-ID"])

    assert follower.take(1) == ["one"]


def test_the_operator_follows_a_build_of_the_tenant_that_is_named(
    mill: Mill, server: Served, held: Held
) -> None:
    mill.append(held, 0, b"one\n")

    follower = server.open(build_of(mill, held), {**mill.operator, "X-Tenant-ID": mill.a_tenant()})

    assert follower.take(1) == ["one"]
    assert server.refusal(build_of(mill, held), mill.operator).status == 400


def test_a_refusal_has_the_form_of_the_surface(mill: Mill, server: Served, held: Held) -> None:
    build_id, member = build_of(mill, held), mill.a_member()
    without_tenant = {"Authorization": member["Authorization"]}
    unknown = {**member, "X-Tenant-ID": held.step_id}

    told = {
        "nobody": server.refusal(build_id),
        "no tenant": server.refusal(build_id, without_tenant),
        "tenant twice": server.refusal(build_id, member, tenant=member["X-Tenant-ID"]),
        "bad tenant": server.refusal(build_id, without_tenant, tenant="x"),
        "not a member": server.refusal(build_id, unknown),
        "no such build": server.refusal(held.step_id, member),
        "bad position": server.refusal(build_id, member, from_="x"),
        "unknown parameter": server.refusal(build_id, member, follow="1"),
        "two credentials": server.refusal(build_id, member, ticket="x"),
        "no such path": server.refusal(build_id, member, path=f"/api/v1/builds/{build_id}/logs"),
    }

    assert {why: (refused.status, refused.body["code"]) for why, refused in told.items()} == {
        "nobody": (401, "UNAUTHORIZED"),
        "no tenant": (400, "INVALID_REQUEST"),
        "tenant twice": (400, "INVALID_REQUEST"),
        "bad tenant": (400, "INVALID_REQUEST"),
        "not a member": (403, "FORBIDDEN"),
        "no such build": (404, "NOT_FOUND"),
        "bad position": (400, "INVALID_REQUEST"),
        "unknown parameter": (400, "INVALID_REQUEST"),
        "two credentials": (400, "INVALID_REQUEST"),
        "no such path": (404, "NOT_FOUND"),
    }
    assert all(
        set(refused.body) == {"error", "code", "timestamp", "trace_id", "details"}
        for refused in told.values()
    )
    assert list(told["no tenant"].body["details"]) == ["X-Tenant-ID"]
    assert list(told["bad tenant"].body["details"]) == ["tenant"]


# How it ends


def test_a_coordinator_that_stops_says_so(mill: Mill, server: Served, held: Held) -> None:
    follower = server.open(build_of(mill, held), mill.a_member())
    mill.append(held, 0, b"one\n")
    follower.take(1)

    server.stop()

    assert follower.rest() == ([], 1012)


@ON_SQLITE
@pytest.mark.threat("F05")
def test_who_takes_nothing_is_told_and_closed_and_the_others_do_not_notice(
    app: Starlette, mill: Mill, held: Held
) -> None:
    with served(impatient(app, Patience(send_s=0.5))) as server:
        build_id, member = build_of(mill, held), mill.a_member()
        stopped = server.open(build_id, member, takes_little=True)
        other = server.open(build_id, member)
        size = 0
        for number in range(60):
            size = mill.append(held, size, f"{number} {'x' * 60_000}\n".encode()).size
        mill.complete(held, logSize=size)

        rest, code = other.rest()
        assert (len(rest), code) == (60, 1000)
        time.sleep(1)
        rest, code = stopped.rest()
        assert len(rest) < 60
        assert code == 4408
