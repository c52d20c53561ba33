import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import pytest

from runner.errors import StepError
from runner.executor.pulls import PullFailed, Pulls
from shared.reasons import Reason


def ignore(line: str) -> None:
    pass


def test_many_who_want_one_image_pull_it_once() -> None:
    gate, count, told = threading.Event(), [], threading.Semaphore(0)

    def pull_once(image: str) -> Generator[str, None, None]:
        count.append(image)
        yield "begun"
        assert gate.wait(10)
        yield "done"

    pulls = Pulls(pull_once)
    with ThreadPoolExecutor(4) as threads:
        waiting = [
            threads.submit(pulls.pull, "a:1", deadline_s=20, progress=lambda line: told.release())
            for _ in range(4)
        ]
        for _ in waiting:
            assert told.acquire(timeout=10)  # every one has joined
        gate.set()
        for one in waiting:
            one.result(timeout=20)

    assert count == ["a:1"]


def test_a_pull_that_takes_too_long_ends_with_its_own_reason() -> None:
    gate = threading.Event()

    def pull_once(image: str) -> Generator[str, None, None]:
        gate.wait(10)
        yield "done"

    with pytest.raises(StepError) as caught:
        Pulls(pull_once).pull("a:1", deadline_s=0.05, progress=ignore)
    gate.set()

    assert caught.value.reason is Reason.PULL_TIMEOUT


@pytest.mark.parametrize(
    ("text", "tries", "reason"),
    [
        ("connection reset by peer", 3, Reason.PULL_NETWORK),
        ("manifest unknown", 1, Reason.IMAGE_NOT_FOUND),
        ("unauthorized: authentication required", 1, Reason.IMAGE_DENIED),
    ],
)
def test_only_what_passes_by_itself_is_tried_again(text: str, tries: int, reason: Reason) -> None:
    count = []

    def pull_once(image: str) -> Generator[str, None, None]:
        count.append(image)
        yield "begun"
        raise PullFailed(text)

    with pytest.raises(StepError) as caught:
        Pulls(pull_once, pause_s=0.001).pull("a:1", deadline_s=20, progress=ignore)

    assert caught.value.reason is reason
    assert caught.value.detail == f"a:1: {text}"
    assert len(count) == tries


def test_a_second_try_that_works_is_a_success() -> None:
    answers = [PullFailed("unexpected EOF"), None]

    def pull_once(image: str) -> Generator[str, None, None]:
        answer = answers.pop(0)
        if answer is not None:
            raise answer
        yield "done"

    lines: list[str] = []
    Pulls(pull_once, pause_s=0.001).pull("a:1", deadline_s=20, progress=lines.append)

    assert answers == []
    assert lines == ["done"]


def test_progress_comes_at_most_once_a_second() -> None:
    def pull_once(image: str) -> Generator[str, None, None]:
        yield from (f"part {number}" for number in range(5000))

    lines: list[str] = []
    Pulls(pull_once).pull("a:1", deadline_s=20, progress=lines.append)

    assert len(lines) <= 2
    assert lines[-1] == "part 4999"


@pytest.mark.threat("F11")
def test_what_nobody_waits_for_is_broken_off_and_can_be_wanted_again() -> None:
    closed, count = threading.Event(), []

    def pull_once(image: str) -> Generator[str, None, None]:
        count.append(image)
        try:
            for number in range(len(count), 1000) if len(count) == 1 else ():
                yield f"piece {number}"
                gate.wait(0.02)
        finally:
            closed.set()

    gate = threading.Event()
    pulls = Pulls(pull_once)
    with pytest.raises(StepError):
        pulls.pull("a:1", deadline_s=0.1, progress=ignore)

    assert closed.wait(5)
    pulls.pull("a:1", deadline_s=20, progress=ignore)
    assert count == ["a:1", "a:1"]


def test_a_pull_goes_on_while_somebody_waits_for_it() -> None:
    gate = threading.Event()

    def pull_once(image: str) -> Generator[str, None, None]:
        while not gate.wait(0.02):
            yield "piece"

    pulls = Pulls(pull_once)
    with ThreadPoolExecutor(1) as threads:
        patient = threads.submit(pulls.pull, "a:1", deadline_s=20, progress=ignore)
        with pytest.raises(StepError):
            pulls.pull("a:1", deadline_s=0.1, progress=ignore)
        assert not patient.done()
        gate.set()
        patient.result(timeout=20)


def test_a_pull_may_take_as_long_as_somebody_waits_for_it(monkeypatch) -> None:
    real, ahead, count = time.monotonic, [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def pull_once(image: str) -> Generator[str, None, None]:
        count.append(image)
        yield "begun"
        ahead[0] = 2 * 3600.0
        yield "nearly there"

    Pulls(pull_once, pause_s=0.001).pull("a:1", deadline_s=3 * 3600, progress=ignore)

    assert count == ["a:1"]
