"""A runner that works waits to be told that one of its steps is to stop."""

import threading
import time
from dataclasses import replace

import httpx
import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.hear_stops import hear_stops
from coordinator.errors import SessionSuperseded
from shared.protocol import Listen, News
from tests.factories import LOCAL, ON_SQLITE, Api, MadeRunner, Mill, a_spec


def heard(mill: Mill, runner: MadeRunner, since: str = "") -> News | None:
    return mill.tx(hear_stops, runner.caller, Listen(session=runner.session, since=since))


def cancel(mill: Mill, build_id: str) -> None:
    mill.now(cancel_build, mill.site, LOCAL, build_id)


def test_what_was_heard_of_is_no_news_and_the_next_stop_is(mill: Mill) -> None:
    runner = mill.a_runner()
    first, second = (mill.a_build(a_spec(a=[])) for _ in range(2))
    assert len(mill.acquire(runner, slots=2)) == 2
    assert heard(mill, runner) is None

    cancel(mill, first.id)
    news = heard(mill, runner)
    assert news is not None
    assert heard(mill, runner, news.since) is None
    mill.clock.advance(0.001)
    cancel(mill, second.id)

    assert heard(mill, runner, news.since) is not None


def test_what_others_hold_is_no_news(mill: Mill) -> None:
    runner, other = mill.a_runner(), mill.a_runner()
    build = mill.a_build(a_spec(a=[]))
    assert mill.acquire(other)

    cancel(mill, build.id)

    assert heard(mill, runner) is None
    assert heard(mill, other) is not None


def test_a_process_that_was_replaced_is_told_so(mill: Mill) -> None:
    runner = mill.a_runner()
    mill.heartbeat(runner)

    with pytest.raises(SessionSuperseded):
        heard(mill, replace(runner, session="another-session"))


def listen(api: Api, runner: dict[str, str], wait: int = 0) -> httpx.Response:
    said = {"session": "the-session", "wait": wait}
    return api.client.post("/api/runner/events", json=said, headers=runner)


@ON_SQLITE
def test_who_waits_hears_of_a_cancel_at_once(api: Api) -> None:
    runner = api.a_runner()
    build = api.a_build()
    api.acquire(runner)
    assert listen(api, runner).status_code == 204

    def stop() -> None:
        time.sleep(0.3)  # so that it is on its way to wait
        api.post(f"/api/builds/{build['id']}/cancel", status=202)

    other = threading.Thread(target=stop)
    other.start()
    began = time.monotonic()
    answer = listen(api, runner, wait=20)
    other.join(10)

    assert answer.status_code == 200
    assert time.monotonic() - began < 1.8  # before it would look again by itself


@ON_SQLITE
@pytest.mark.threat("I15")
def test_who_asks_too_often_is_told_to_wait(api: Api) -> None:
    runner = api.a_runner()

    answers = [listen(api, runner).status_code for _ in range(150)]

    assert answers[0] == 204
    assert 429 in answers
