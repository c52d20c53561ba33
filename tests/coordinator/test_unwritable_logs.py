"""A log that cannot be written keeps neither its own step nor any other from ending."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.actions.cancel_build import cancel_build
from tests.coordinator.test_full_disk import fail_with
from tests.factories import LOCAL, ON_SQLITE, Api, Held, HeldOverHttp, Mill, a_step

EXCLUSIVE = [a_step("test", exclusive=True)]  # never tried again, so that its log is ended

Break = Callable[[pytest.MonkeyPatch, Path], None]


def fill_the_disk(patch: pytest.MonkeyPatch, path: Path) -> None:
    fail_with(patch, "pwrite", errno.ENOSPC, f"/{path.parent.name}/")


def make_read_only(patch: pytest.MonkeyPatch, path: Path) -> None:
    fail_with(patch, "pwrite", errno.EROFS, f"/{path.parent.name}/")


def put_a_folder_there(_patch: pytest.MonkeyPatch, path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN = pytest.mark.parametrize("break_it", [fill_the_disk, make_read_only, put_a_folder_there])


@pytest.fixture
def later(mill: Mill) -> Mill:
    """After the time in which nobody counts as silent."""
    mill.clock.advance(100)
    return mill


def two_running(mill: Mill) -> tuple[Held, Held]:
    first, second = mill.a_running_step(EXCLUSIVE), mill.a_running_step(EXCLUSIVE)
    for held in (first, second):
        mill.append(held, 0, b"hello\n")
    return first, second


def path_of(mill: Mill, held: Held) -> Path:
    step = mill.step(held.step_id)
    return mill.site.logs.path(step.build_id, step.id, step.attempt)


@BROKEN
def test_steps_of_lost_runners_end_when_one_log_cannot_be_ended(
    later: Mill, monkeypatch: pytest.MonkeyPatch, break_it: Break
) -> None:
    broken, sound = two_running(later)
    break_it(monkeypatch, path_of(later, broken))
    later.clock.advance(301)

    assert later.expire() == 2

    for held in (broken, sound):
        step = later.step(held.step_id)
        assert (step.state, step.reason) == ("failed", "runner_lost")
        assert later.attempts(held.step_id)[0].log_state == "gap"
    assert later.step(broken.step_id).log_size == 6
    assert b"no runner said that it is all" in path_of(later, sound).read_bytes()


@BROKEN
def test_cancelled_steps_end_when_one_log_cannot_be_ended(
    later: Mill, monkeypatch: pytest.MonkeyPatch, break_it: Break
) -> None:
    broken, sound = two_running(later)
    for held in (broken, sound):
        later.now(cancel_build, later.site, LOCAL, later.step(held.step_id).build_id)
    break_it(monkeypatch, path_of(later, broken))
    later.clock.advance(21)

    assert later.expire() == 2

    for held in (broken, sound):
        assert later.step(held.step_id).state == "cancelled"
        assert later.attempts(held.step_id)[0].log_state == "gap"
    assert later.step(broken.step_id).log_size == 6


@ON_SQLITE
def test_no_request_waits_for_the_log_of_a_lost_attempt(
    api: Api, mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short transactions run in the event loop, where a disk that hangs would hold up everybody."""
    mill.clock.advance(100)
    lost = api.a_running_step()
    mill.clock.advance(61)
    assert mill.expire() == 1
    mill.clock.advance(60)
    runner = api.a_runner()
    again = HeldOverHttp(api.client, api.acquire(runner)[0], runner)
    writers: list[str] = []
    real = os.pwrite

    def pwrite(*args: Any) -> int:
        writers.append(threading.current_thread().name)
        return real(*args)

    monkeypatch.setattr(os, "pwrite", pwrite)

    assert again.post("start", {}).status_code == 200

    assert again.step_id == lost.step_id
    assert writers == ["write-lane"]
