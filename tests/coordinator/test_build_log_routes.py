"""The log of a build over HTTP, and the tickets that open it as a WebSocket."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.types import Message

from coordinator.actions.delete_build import delete_build
from coordinator.actions.start_step import start_step
from coordinator.rules.log_lines import LONGEST_PART
from shared.protocol import Start
from tests.factories import LOCAL, ON_SQLITE, Held, Mill, a_spec
from tests.fakes import a_scope

NDJSON = "application/x-ndjson"


@pytest.fixture
def held(mill: Mill) -> Held:
    return mill.a_running_step()


def build_of(mill: Mill, held: Held) -> str:
    return str(mill.step(held.step_id).build_id)


def log_of(
    client: httpx.Client, build_id: str, headers: dict[str, str], query: str = ""
) -> list[dict[str, Any]]:
    answer = client.get(f"/api/v1/builds/{build_id}/logs{query}", headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == NDJSON
    return [json.loads(line) for line in answer.text.splitlines()]


def test_a_log_is_lines_of_json_in_the_contracts_form(mill: Mill, client: httpx.Client, held: Held) -> None:
    build_id = build_of(mill, held)
    mill.append(held, 0, b'[buildmill] pulled\n\xff"quoted"\n')

    first, second = log_of(client, build_id, mill.a_member())

    assert first == {
        "build_id": build_id,
        "timestamp": "2026-03-01T08:00:00.000Z",
        "level": "INFO",
        "message": "[buildmill] pulled",
        "metadata": {"seq": "1.1", "step": "test", "attempt": "1"},
    }
    assert (second["message"], second["metadata"]["seq"]) == ('\ufffd"quoted"', "1.2")


def test_what_came_out_of_a_container_names_it_as_the_engine_does(mill: Mill, client: httpx.Client) -> None:
    held = mill.an_acquired_step()
    mill.append(held, 0, b"[buildmill] pulling\n")
    mill.clock.advance(1)
    said = Start(image_digest="box@sha256:0")
    mill.now(start_step, mill.site, held.runner.caller, held.step_id, held.proof, said)
    mill.append(held, 20, b"hello\n")

    before, after = log_of(client, build_of(mill, held), mill.a_member())

    assert "container" not in before["metadata"]
    name = f"buildmill-{held.runner.id[-8:]}-{held.step_id}-1"
    assert after["metadata"]["container"] == name


def test_a_reader_goes_on_behind_the_last_message_it_has_seen(
    mill: Mill, client: httpx.Client, held: Held
) -> None:
    build_id, member = build_of(mill, held), mill.a_member()
    mill.append(held, 0, b"one\ntwo\n")
    whole = log_of(client, build_id, member)

    seen = whole[0]["metadata"]["seq"]
    assert log_of(client, build_id, member, f"?from={seen}") == whole[1:]
    assert log_of(client, build_id, member, "?from=0") == whole
    assert log_of(client, build_id, member, "?from=99.1") == []


def test_a_long_line_comes_in_parts_that_say_so(mill: Mill, client: httpx.Client, held: Held) -> None:
    mill.append(held, 0, b"x" * (LONGEST_PART + 1) + b"\n")

    first, second = log_of(client, build_of(mill, held), mill.a_member())

    assert first["metadata"]["partial"] == "true"
    assert "partial" not in second["metadata"]
    assert (len(first["message"]), len(second["message"])) == (LONGEST_PART, 1)


@pytest.mark.parametrize(
    ("query", "accept", "is_text"),
    [
        ("", "text/plain", True),
        ("", "text/plain; charset=utf-8, */*;q=0.1", True),
        ("", "text/plain, application/json", False),
        ("", "*/*", False),
        ("?format=text", "application/json", True),
        ("?format=json", "text/plain", False),
    ],
)
def test_a_log_can_be_had_as_text(
    mill: Mill, client: httpx.Client, held: Held, query: str, accept: str, is_text: bool
) -> None:
    mill.append(held, 0, b"one\n\xfftwo\n")
    headers = {**mill.a_member(), "Accept": accept}

    answer = client.get(f"/api/v1/builds/{build_of(mill, held)}/logs{query}", headers=headers)

    media_type = "text/plain; charset=utf-8" if is_text else NDJSON
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
    assert (answer.content == b"one\n\xfftwo\n") is is_text


def test_the_lines_of_all_steps_stand_in_one_log(mill: Mill, client: httpx.Client) -> None:
    build = mill.a_build(a_spec(a=[], b=[]))
    for one in mill.acquire(mill.a_runner(), slots=2):
        mill.append(one, 0, b"hello")
        mill.complete(one)

    found = log_of(client, build.id, mill.a_member())

    assert [(line["metadata"]["step"], line["message"]) for line in found] == [("a", "hello"), ("b", "hello")]


def test_a_build_that_has_not_begun_has_an_empty_log(mill: Mill, client: httpx.Client) -> None:
    assert log_of(client, mill.a_build().id, mill.a_member()) == []


async def test_a_log_that_goes_away_while_it_is_read_does_not_end_as_if_that_were_all(
    app: Starlette, mill: Mill, held: Held
) -> None:
    build_id = build_of(mill, held)
    data = b"a line that is one of many\n" * 20_000
    mill.append(held, 0, data)
    mill.complete(held)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 2:  # the beginning is on its way
            await asyncio.to_thread(mill.now, delete_build, LOCAL, build_id)

    async def receive() -> Message:
        if not asked:
            await asyncio.Event().wait()
        return asked.pop()

    asked: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}]
    headers = [(name.lower().encode(), value.encode()) for name, value in mill.a_member().items()]
    path = f"/api/v1/builds/{build_id}/logs".encode()
    await app(a_scope("GET", path, headers=[(b"host", b"localhost:3000"), *headers]), receive, send)

    assert sent[0]["status"] == 200
    assert sum(len(message["body"]) for message in sent[1:]) > 0
    assert sent[-1]["more_body"]


def test_the_log_of_another_tenants_build_is_not_there(mill: Mill, client: httpx.Client, held: Held) -> None:
    stranger = mill.a_member("other")

    foreign = client.get(f"/api/v1/builds/{build_of(mill, held)}/logs", headers=stranger)
    unknown = client.get(f"/api/v1/builds/{held.step_id}/logs", headers=stranger)

    assert foreign.status_code == unknown.status_code == 404
    told = [{**answer.json(), "trace_id": "", "timestamp": ""} for answer in (foreign, unknown)]
    assert told[0] == told[1]


@ON_SQLITE
@pytest.mark.threat("L08")
@pytest.mark.parametrize(
    "query", ["from=1", "from=-1.1", "from=1.1.1", "from=x", "from=1.1&from=1.2", "format=xml", "follow=true"]
)
def test_a_question_that_makes_no_sense_is_refused(
    mill: Mill, client: httpx.Client, held: Held, query: str
) -> None:
    answer = client.get(f"/api/v1/builds/{build_of(mill, held)}/logs?{query}", headers=mill.a_member())

    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")
    assert list(answer.json()["details"]) == [query.partition("=")[0]]


def test_a_live_log_without_an_upgrade_is_a_bad_request_that_says_what_is_missing(
    mill: Mill, client: httpx.Client, held: Held
) -> None:
    path = f"/api/v1/builds/{build_of(mill, held)}/logs/stream"

    answer = client.get(path, headers=mill.a_member())

    assert (answer.status_code, answer.json()["code"]) == (400, "INVALID_REQUEST")
    assert "WebSocket" in answer.json()["error"]
    assert client.get(path).status_code == 401


# Tickets


def test_a_ticket_is_given_to_who_may_read_the_build(mill: Mill, client: httpx.Client, held: Held) -> None:
    body = {"build_id": build_of(mill, held)}
    member = mill.a_member(role="viewer")
    del member["X-Tenant-ID"]

    answer = client.post("/api/v1/auth/ws-tickets", json=body, headers=member)

    assert answer.status_code == 201
    assert set(answer.json()) == {"ticket", "expires_at"}
    assert answer.json()["expires_at"] == "2026-03-01T08:00:30.000Z"


def test_no_ticket_is_given_for_what_is_not_ones_own(mill: Mill, client: httpx.Client, held: Held) -> None:
    def asked(headers: dict[str, str], build_id: str) -> int:
        return client.post(
            "/api/v1/auth/ws-tickets", json={"build_id": build_id}, headers=headers
        ).status_code

    build_id = build_of(mill, held)

    assert asked(mill.a_member("other"), build_id) == 404
    assert asked(mill.a_member(), held.step_id) == 404
    assert asked(mill.a_member(), "no-uuid") == 400
    assert asked(mill.an_api_token("acme", "ticket:create", "build:list"), build_id) == 403
    assert asked({}, build_id) == 401
