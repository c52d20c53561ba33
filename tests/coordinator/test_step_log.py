"""A log is read whole, in ranges, per attempt, and followed while it grows."""

import asyncio
import base64
import json
from typing import Any

import pytest
from starlette.applications import Starlette

from tests.factories import ON_SQLITE, Api, HeldOverHttp
from tests.fakes import a_scope, carry

TIME_LIMIT = 20.0


def events_in(text: str) -> list[dict[str, Any]]:
    """Each event as {id, event, data}; comments are left out."""
    events = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if fields:
            events.append({**fields, "data": json.loads(fields["data"])})
    return events


@pytest.fixture
def held(api: Api) -> HeldOverHttp:
    return api.a_running_step()


def test_a_log_that_grows_can_be_read_at_any_time(api: Api, held: HeldOverHttp) -> None:
    path = f"/api/steps/{held.step_id}/log"
    assert api.client.get(path).content == b""
    held.append(0, b"one\n")

    answer = api.client.get(path)

    assert (answer.status_code, answer.content) == (200, b"one\n")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-log-state"] == "open"
    assert "etag" not in answer.headers


def test_a_log_that_is_complete_has_a_digest(api: Api, held: HeldOverHttp) -> None:
    held.append(0, b"one\n")
    held.complete(logSize=4)

    answer = api.client.get(f"/api/steps/{held.step_id}/log")

    assert answer.headers["x-log-state"] == "complete"
    known = {"If-None-Match": answer.headers["etag"]}
    assert api.client.get(f"/api/steps/{held.step_id}/log", headers=known).status_code == 304


def test_a_range_of_a_log_can_be_read(api: Api, held: HeldOverHttp) -> None:
    held.append(0, b"one\ntwo\n")

    answer = api.client.get(f"/api/steps/{held.step_id}/log", headers={"Range": "bytes=4-"})
    beyond = api.client.get(f"/api/steps/{held.step_id}/log", headers={"Range": "bytes=8-"})

    assert (answer.status_code, answer.content) == (206, b"two\n")
    assert beyond.status_code == 416


def test_bytes_behind_the_recorded_length_are_never_shown(
    api: Api, held: HeldOverHttp, coordinator: Any
) -> None:
    held.append(0, b"one\n")
    path = coordinator.site.logs.path(held.claim["buildId"], held.step_id, 1)
    with path.open("ab") as file:
        file.write(b"left by a crash")

    assert api.client.get(f"/api/steps/{held.step_id}/log").content == b"one\n"
    assert held.append(4, b"two\n").json()["size"] == 8
    assert api.client.get(f"/api/steps/{held.step_id}/log").content == b"one\ntwo\n"


def test_without_a_word_the_latest_attempt_is_shown(api: Api, held: HeldOverHttp, clock: Any) -> None:
    held.append(0, b"first\n")
    held.complete("failed", reason="internal", logSize=6)
    clock.advance(10)
    second = HeldOverHttp(api.client, api.acquire(held.runner)[0], held.runner)
    second.append(0, b"second\n")
    path = f"/api/steps/{held.step_id}/log"

    assert api.client.get(path).content == b"second\n"
    assert api.client.get(f"{path}?attempt=2").content == b"second\n"
    assert api.client.get(f"{path}?attempt=1").content == b"first\n"
    assert api.client.get(f"{path}?attempt=3").status_code == 404


@ON_SQLITE
@pytest.mark.threat("L08")
@pytest.mark.parametrize(
    "query",
    [
        "attempt=0",
        "attempt=-1",
        "attempt=2147483648",
        f"attempt={10**30}",
        "attempt=1&attempt=1",
        "follow=yes",
        "x=1",
    ],
)
def test_a_question_that_makes_no_sense_is_refused(api: Api, held: HeldOverHttp, query: str) -> None:
    assert api.client.get(f"/api/steps/{held.step_id}/log?{query}").status_code == 400


def test_a_step_that_waits_has_an_empty_log_and_an_unknown_one_has_none(api: Api) -> None:
    step_id = api.a_build()["steps"][0]["id"]

    assert api.client.get(f"/api/steps/{step_id}/log").content == b""
    assert api.client.get("/api/steps/nope/log").status_code == 404
    assert api.client.get("/api/steps/nope/log?follow=true").status_code == 404


# Followers


def test_a_follower_of_a_finished_log_gets_it_all_and_the_end(api: Api, held: HeldOverHttp) -> None:
    held.append(0, b"one\n")
    held.append(4, b"two\n")
    held.complete(logSize=8)

    answer = api.client.get(f"/api/steps/{held.step_id}/log?follow=true")

    assert answer.headers["content-type"].startswith("text/event-stream")
    events = events_in(answer.text)
    assert "".join(event["data"]["text"] for event in events[:-1]) == "one\ntwo\n"
    assert events[-1]["event"] == "end"
    assert (events[-1]["data"]["size"], events[-1]["data"]["state"]) == (8, "complete")


def test_a_follower_resumes_behind_the_last_event_it_has_seen(api: Api, held: HeldOverHttp) -> None:
    held.append(0, b"one\ntwo\n")
    held.complete(logSize=8)
    path = f"/api/steps/{held.step_id}/log?follow=true"

    def seen_after(last_event_id: str) -> str:
        answer = api.client.get(path, headers={"Last-Event-ID": last_event_id})
        return "".join(event["data"].get("text", "") for event in events_in(answer.text))

    assert seen_after("1:4") == "two\n"
    assert seen_after("1:8") == ""
    assert seen_after("1:9999") == ""
    assert seen_after("2:4") == "one\ntwo\n"
    assert seen_after("1:-4") == "one\ntwo\n"
    assert seen_after("4") == "two\n"
    assert seen_after("8") == ""
    assert seen_after("9999") == ""
    assert seen_after("nonsense") == "one\ntwo\n"
    assert seen_after("-1") == "one\ntwo\n"


@ON_SQLITE
def test_bytes_that_are_no_text_are_kept_beside_it(api: Api, held: HeldOverHttp) -> None:
    data = b"caf\xe9\n\n\nevent: end\ndata: {}\n\n"
    held.append(0, data)
    held.complete(logSize=len(data))

    events = events_in(api.client.get(f"/api/steps/{held.step_id}/log?follow=true").text)

    assert [event["event"] for event in events] == ["log", "end"]
    assert base64.b64decode(events[0]["data"]["base64"]) == data


async def test_a_follower_sees_each_piece_as_it_comes(app: Starlette, api: Api, held: HeldOverHttp) -> None:
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    scope = a_scope(
        "GET",
        f"/api/steps/{held.step_id}/log".encode(),
        query=b"follow=true",
        headers=[(b"host", b"localhost:3000")],
    )
    following = asyncio.create_task(carry(app, scope, b"", seen=pieces.put_nowait))

    async def next_event() -> dict[str, Any]:
        async with asyncio.timeout(TIME_LIMIT):
            while True:
                if events := events_in((await pieces.get()).decode()):
                    return events[0]

    for number, piece in enumerate((b"one\n", b"two\n", b"six\n")):
        await asyncio.to_thread(held.append, number * 4, piece)
        event = await next_event()
        assert (event["id"], event["data"]["text"]) == (f"1:{number * 4 + 4}", piece.decode())
    await asyncio.to_thread(held.complete, logSize=12)
    assert (await next_event())["event"] == "end"

    async with asyncio.timeout(TIME_LIMIT):
        status, _, _ = await following
    assert status == 200


def test_who_resumes_in_another_attempt_is_told_and_begins_anew(
    api: Api, held: HeldOverHttp, clock: Any
) -> None:
    held.append(0, b"first\n")
    held.complete("failed", reason="internal", logSize=6)
    clock.advance(10)
    second = HeldOverHttp(api.client, api.acquire(held.runner)[0], held.runner)
    second.append(0, b"second\n")
    second.complete(logSize=7)
    path = f"/api/steps/{held.step_id}/log?follow=true"

    def seen_after(last_event_id: str, more: str = "") -> list[tuple[str, str, Any]]:
        answer = api.client.get(path + more, headers={"Last-Event-ID": last_event_id})
        return [
            (event["event"], event["id"], event["data"].get("attempt") or event["data"].get("text"))
            for event in events_in(answer.text)
        ]

    anew = [("attempt", "2:0", 2), ("log", "2:7", "second\n"), ("end", "2:7", None)]
    assert seen_after("1:4") == anew
    assert seen_after("4") == anew
    assert seen_after("2:3") == [("log", "2:7", "ond\n"), ("end", "2:7", None)]
    assert seen_after("") == anew[1:]
    assert seen_after("1:4", "&attempt=1") == [("log", "1:6", "t\n"), ("end", "1:6", None)]
    assert seen_after("4", "&attempt=2") == [("log", "2:7", "nd\n"), ("end", "2:7", None)]


async def test_a_follower_is_told_of_a_new_attempt_and_gets_its_log_from_the_start(
    app: Starlette, api: Api, held: HeldOverHttp, clock: Any
) -> None:
    pieces: asyncio.Queue[bytes] = asyncio.Queue()
    scope = a_scope(
        "GET",
        f"/api/steps/{held.step_id}/log".encode(),
        query=b"follow=true",
        headers=[(b"host", b"localhost:3000")],
    )
    await asyncio.to_thread(held.append, 0, b"one\n")
    following = asyncio.create_task(carry(app, scope, b"", seen=pieces.put_nowait))

    async def next_event() -> tuple[str, str]:
        async with asyncio.timeout(TIME_LIMIT):
            while True:
                if events := events_in((await pieces.get()).decode()):
                    return events[0]["event"], events[0]["id"]

    assert await next_event() == ("log", "1:4")
    await asyncio.to_thread(held.complete, "failed", reason="internal", logSize=4)
    clock.advance(10)
    claims = await asyncio.to_thread(api.acquire, held.runner)
    second = HeldOverHttp(api.client, claims[0], held.runner)
    await asyncio.to_thread(second.append, 0, b"second\n")

    assert await next_event() == ("attempt", "2:0")
    assert await next_event() == ("log", "2:7")
    await asyncio.to_thread(second.complete, logSize=7)
    assert await next_event() == ("end", "2:7")
    async with asyncio.timeout(TIME_LIMIT):
        await following


async def test_a_follower_that_leaves_is_forgotten(app: Starlette, held: HeldOverHttp) -> None:
    bell = app.state.coordinator.bell
    scope = a_scope(
        "GET",
        f"/api/steps/{held.step_id}/log".encode(),
        query=b"follow=true",
        headers=[(b"host", b"localhost:3000")],
    )
    waits = asyncio.Event()
    following = asyncio.create_task(carry(app, scope, b"", seen=lambda _piece: waits.set()))
    await asyncio.to_thread(held.append, 0, b"one\n")
    async with asyncio.timeout(TIME_LIMIT):
        await waits.wait()

    following.cancel()
    with pytest.raises(asyncio.CancelledError):
        await following

    assert not bell._waiters
