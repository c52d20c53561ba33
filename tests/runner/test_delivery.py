"""A log arrives whole and in order at a coordinator that forgets, refuses and goes away."""

import threading
import time

import httpx
import pytest

from runner.client import Client
from runner.delivery import LogDelivery
from runner.errors import LeaseLost
from runner.log_stream import LogStream
from runner.mask import Masker
from tests.runner.claims import an_attempt

LINES = b"".join(b"line %d\n" % number for number in range(5000))


class Coordinator:
    """Keeps a log as the coordinator does; `fault` may answer in its place."""

    def __init__(self):
        self.log = b""
        self.fault = lambda offset, data: None
        self.asked = 0
        self.arrived = threading.Event()
        self.grown = threading.Condition()

    def __call__(self, request):
        self.asked += 1
        offset, data = int(request.url.params["offset"]), request.content
        answer = self.fault(offset, data)
        if answer is not None:
            return answer
        if offset > len(self.log):
            return refusal(416, "log_gap", size=len(self.log))
        overlap = self.log[offset : offset + len(data)]
        if overlap != data[: len(overlap)]:
            return refusal(409, "log_conflict", size=len(self.log))
        self.log = self.log[:offset] + overlap + data[len(overlap) :] + self.log[offset + len(data) :]
        self.arrived.set()
        with self.grown:
            self.grown.notify_all()
        return httpx.Response(200, json={"size": len(self.log), "action": "continue"})

    def has_got(self, size):
        with self.grown:
            return self.grown.wait_for(lambda: len(self.log) >= size, 10)


def refusal(status, code, **more):
    return httpx.Response(status, json={"error": "no", "code": code, "details": [], **more})


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def attempt():
    return an_attempt()


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def delivery(coordinator, attempt, path):
    client = Client("http://coordinator.test", "secret", transport=httpx.MockTransport(coordinator))
    stream = LogStream(path, Masker([]))
    made = LogDelivery(client, attempt, stream)
    made.start()
    yield made
    made.stop()
    stream.close()
    client.close()


def write(path, data):
    with path.open("ab") as file:
        file.write(data)


def once(answer):
    """A fault that happens the first time only."""
    left = [answer]
    return lambda offset, data: left.pop() if left else None


def test_what_is_written_arrives_while_the_step_runs(coordinator, delivery, path):
    write(path, b"first\n")

    assert coordinator.arrived.wait(10)
    assert coordinator.log == b"first\n"


def test_everything_has_arrived_when_it_is_finished(coordinator, delivery, path):
    write(path, LINES + b"no newline at the end")

    delivery.finish()

    assert coordinator.log == LINES + b"no newline at the end"


def test_a_step_that_prints_more_than_a_request_takes_is_sent_without_pauses(
    coordinator, attempt, path, monkeypatch
):
    for pause in ("PAUSE_S", "WAIT_S"):
        monkeypatch.setattr(f"runner.delivery.{pause}", 60)
    printed = LINES * 70  # some requests full, and a rest
    write(path, printed)
    stream = LogStream(path, Masker([]))
    client = Client("http://coordinator.test", "secret", transport=httpx.MockTransport(coordinator))
    made = LogDelivery(client, attempt, stream)

    made.start()
    is_there = coordinator.has_got(len(printed))

    made.hurry()
    made.close()
    client.close()
    assert is_there


class SlowToReturn(LogStream):
    """Its `finish` returns only when the reader has had the last of the log, or a moment later."""

    def finish(self):
        super().finish()
        until = time.monotonic() + 1
        while not self.is_at_end and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.05)  # for the reader to look what comes next


def test_who_reads_the_last_of_a_log_waits_for_no_more_lines(coordinator, attempt, path, monkeypatch):
    monkeypatch.setattr("runner.delivery.WAIT_S", 30.0)
    client = Client("http://coordinator.test", "secret", transport=httpx.MockTransport(coordinator))
    delivery = LogDelivery(client, attempt, SlowToReturn(path, Masker([])))
    delivery.start()
    write(path, b"all there is\n")
    delivery.hurry()
    assert coordinator.arrived.wait(10)

    began = time.monotonic()
    delivery.finish()

    assert time.monotonic() - began < 15
    assert coordinator.log == b"all there is\n"
    delivery.close()
    client.close()


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(503, json={"error": "busy", "code": "busy"}),
        httpx.Response(502, text="<html>"),
        httpx.Response(200, text="<html>"),
        refusal(416, "log_gap", size=0),
        refusal(409, "log_conflict", size=0),
    ],
)
def test_no_answer_makes_a_hole(coordinator, delivery, path, answer):
    coordinator.fault = once(answer)
    write(path, LINES)

    delivery.finish()

    assert coordinator.log == LINES


def test_an_answer_that_was_lost_makes_nothing_twice(coordinator, delivery, path):
    def keep_and_break(offset, data):
        coordinator.log += data
        coordinator.fault = lambda offset, data: None
        return httpx.Response(504, text="")

    coordinator.fault = keep_and_break
    write(path, LINES)

    delivery.finish()

    assert coordinator.log == LINES


def test_a_coordinator_that_lost_its_end_gets_it_again(coordinator, delivery, path):
    write(path, LINES)
    delivery.finish()
    coordinator.log = coordinator.log[:1000]

    delivery.rewind(1000)

    assert coordinator.log == LINES


def test_beyond_the_limit_nothing_is_sent_and_the_step_goes_on(coordinator, delivery, path):
    coordinator.fault = lambda offset, data: refusal(413, "too_large", limit=100, size=150)
    write(path, LINES)
    until = time.monotonic() + 10
    while not delivery.is_truncated and time.monotonic() < until:
        time.sleep(0.01)
    asked = coordinator.asked
    write(path, LINES)

    delivery.finish()

    assert delivery.is_truncated
    assert coordinator.asked == asked


def test_a_lost_lease_ends_the_delivery_and_is_told(coordinator, delivery, path):
    coordinator.fault = lambda offset, data: refusal(409, "stale_attempt")
    write(path, LINES)

    with pytest.raises(LeaseLost):
        delivery.finish()


def test_a_lost_lease_is_told_to_who_watches_the_script(coordinator, delivery, attempt, path):
    coordinator.fault = lambda offset, data: refusal(409, "stale_attempt")
    write(path, b"first\n")

    assert attempt.abandoned.wait(5)


def test_a_cancel_is_heard_in_the_answer_to_the_log(coordinator, delivery, attempt, path):
    coordinator.fault = once(httpx.Response(200, json={"size": 6, "action": "cancel"}))
    write(path, b"first\n")

    assert attempt.cancelled.wait(10)


def test_an_abandoned_attempt_does_not_wait_for_a_coordinator_that_is_away(
    coordinator, delivery, attempt, path
):
    coordinator.fault = lambda offset, data: httpx.Response(503, headers={"Retry-After": "600"}, json={})
    write(path, LINES)
    threading.Timer(0.2, attempt.abandon).start()

    with pytest.raises(LeaseLost):
        delivery.finish()


def test_a_log_is_not_closed_under_a_request_that_is_under_way(coordinator, attempt, path, monkeypatch):
    asked, go = threading.Event(), threading.Event()

    def hang(offset, data):
        asked.set()
        go.wait(20)

    coordinator.fault = hang
    monkeypatch.setattr("runner.delivery.STOP_S", 0.1)
    client = Client("http://coordinator.test", "secret", transport=httpx.MockTransport(coordinator))
    stream = LogStream(path, Masker([]))
    made = LogDelivery(client, attempt, stream)
    made.start()
    write(path, LINES)
    assert asked.wait(10)

    made.close()
    assert stream.written == len(LINES)
    go.set()

    until = time.monotonic() + 10
    while is_open(stream) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_open(stream)
    client.close()


def is_open(stream):
    try:
        return stream.written >= 0
    except OSError:
        return False


@pytest.mark.parametrize("status", [503, 409])
def test_what_was_read_ahead_makes_no_hole_either(coordinator, delivery, path, status):
    """Each request is the largest there is, and the middle one is not taken at first."""
    whole = LINES * 120
    forgets = [int(len(whole) / 2)]

    def forget_once(offset, data):
        if forgets and offset >= forgets[0]:
            forgets.clear()
            if status == 503:
                return refusal(503, "busy")
            coordinator.log = coordinator.log[:1000]
            return refusal(409, "log_conflict", size=1000)
        return None

    coordinator.fault = forget_once
    write(path, whole)

    delivery.finish()

    assert coordinator.log == whole
