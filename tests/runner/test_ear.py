"""Who listens has its heartbeat come at once, and nobody depends on it."""

import json
import threading
import time

import httpx
import pytest

from runner import ear
from runner.client import Client
from runner.ear import Ear
from tests.runner.test_step_run import refusal


class Teller:
    """Answers each question with the next of `answers`, then holds its tongue."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []
        self.is_over = threading.Event()

    def __call__(self, request):
        self.asked.append(json.loads(request.content))
        if self.answers:
            return self.answers.pop(0)
        self.is_over.wait(20)
        return httpx.Response(204)


@pytest.fixture
def listen():
    begun = []

    def begin(teller, *, is_busy=lambda: True):
        heard = threading.Semaphore(0)
        client = Client("http://coordinator.test", transport=httpx.MockTransport(teller))
        one = Ear(client, session="the-session", is_busy=is_busy, heard=heard.release)
        begun.append((one, teller))
        one.start()
        return heard

    yield begin
    for one, teller in begun:
        one.stop()
        teller.is_over.set()
        one._thread.join(10)
        assert not one._thread.is_alive()


def test_news_is_passed_on_and_not_asked_for_again(listen):
    teller = Teller(httpx.Response(200, json={"since": "later"}), httpx.Response(204))

    heard = listen(teller)

    assert heard.acquire(timeout=5)
    deadline = time.monotonic() + 5
    while len(teller.asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [said["since"] for said in teller.asked] == ["", "later", "later"]
    assert not heard.acquire(blocking=False)


def test_who_has_nothing_to_stop_asks_nothing(listen):
    teller = Teller()

    listen(teller, is_busy=lambda: False)

    time.sleep(0.3)  # it would have asked at once
    assert teller.asked == []


@pytest.mark.parametrize(
    "answer", [refusal(404, "not_found"), refusal(405, "method_not_allowed"), httpx.Response(502)]
)
def test_who_is_refused_or_not_understood_asks_again_later(listen, monkeypatch, answer):
    monkeypatch.setattr(ear, "AWAY_S", 0.6)
    monkeypatch.setattr(ear, "REFUSED_S", 0.6)
    teller = Teller(answer, httpx.Response(200, json={"since": "later"}))
    began = time.monotonic()

    heard = listen(teller)

    assert heard.acquire(timeout=10)
    assert time.monotonic() - began >= 0.6
