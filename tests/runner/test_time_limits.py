"""Each limit ends a step for its own reason, and no clock on the wall has a say in it."""
# ruff: noqa: F811 - fixtures are imported by their names

import re
import threading
import time
from pathlib import Path

import pytest

import runner as package
from runner.errors import StepError
from runner.executor.pulls import Pulls
from runner.journal import Journal, JournalPhase, attempt_dir
from runner.step_run import StepRun
from shared.protocol import Limits
from shared.reasons import Reason
from tests.runner.claims import a_claim, an_attempt
from tests.runner.test_step_run import attempt, coordinator, means, run, wishes  # noqa: F401

# Where the runner asks for the time on the wall, and what for: nothing that ends, keeps or deletes work.
ON_THE_WALL = {
    "step_run.py": "tells people when a step began and ended",
}


def until(look, timeout_s=20):
    ends = time.monotonic() + timeout_s
    while not look() and time.monotonic() < ends:
        time.sleep(0.01)


def test_a_step_that_prints_nothing_for_too_long_ends_for_that_reason(run, coordinator):
    began = time.monotonic()

    run("echo begun; sleep 60", limits=Limits(timeout_s=60, no_output_s=1, grace_s=1))

    (said,) = coordinator.completions
    assert (said["status"], said["reason"], said["infra"]) == ("failed", "no_output", False)
    assert b"\n[buildmill] error: nothing was printed for 1 s\n" in coordinator.log
    assert time.monotonic() - began < 6


def test_a_step_that_prints_a_dot_now_and_then_goes_on(run, coordinator):
    run("for n in 1 2 3 4 5 6; do printf .; sleep 0.5; done", limits=Limits(timeout_s=60, no_output_s=2))

    assert [said["status"] for said in coordinator.completions] == ["success"]


def test_silence_counts_on_when_another_life_of_the_runner_takes_over(coordinator, means, state):
    limits = Limits(timeout_s=60, no_output_s=3, grace_s=1)
    claim = a_claim("echo begun; sleep 60", limits=limits).model_dump(mode="json")
    journal = Journal.create(attempt_dir(state, "step-1", 1), claim)
    first = an_attempt()
    dying = StepRun(means, journal, first)
    dying._cleaning.prove = lambda free: None  # what is dead cleans nothing up

    def kill():
        until(lambda: b"begun" in coordinator.log)
        time.sleep(2)
        first.abandon()

    threading.Thread(target=kill).start()
    dying.run()
    assert Journal.load(journal.folder).phase is JournalPhase.RUNNING
    began = time.monotonic()

    StepRun(means, Journal.load(journal.folder), an_attempt()).run()

    assert [said["reason"] for said in coordinator.completions] == ["no_output"]
    assert time.monotonic() - began < 2.5


@pytest.mark.parametrize("hours", [1, -1])
def test_a_jump_of_the_clock_on_the_wall_changes_nothing(run, coordinator, state, monkeypatch, hours):
    real = time.time
    jumped = threading.Event()
    monkeypatch.setattr(time, "time", lambda: real() + (3600 * hours if jumped.is_set() else 0))
    monkeypatch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))

    def jump():
        until((state / "ran").exists)
        jumped.set()

    threading.Thread(target=jump, daemon=True).start()
    run(
        f"touch {state}/ran; for n in 1 2 3 4 5; do echo $n; sleep 0.5; done; echo x > out",
        limits=Limits(timeout_s=30, no_output_s=10),
        output_paths=["out"],
    )

    assert jumped.is_set()
    assert [said["status"] for said in coordinator.completions] == ["success"]


@pytest.mark.parametrize("hours", [1, -1])
def test_a_time_limit_is_kept_although_the_clock_on_the_wall_jumps(
    run, coordinator, state, monkeypatch, hours
):
    real, began = time.time, time.monotonic()
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours * (time.monotonic() - began > 1.5))

    run("sleep 60", limits=Limits(timeout_s=60, no_output_s=3, grace_s=1))

    assert [said["reason"] for said in coordinator.completions] == ["no_output"]
    assert 3 <= time.monotonic() - began < 8


def test_the_clock_on_the_wall_is_asked_only_where_that_is_named():
    asked = {
        path.name
        for path in Path(package.__file__).parent.rglob("*.py")
        if re.search(r"\b(time\.time\(|utc_now\(|datetime\.now|CLOCK_REALTIME)", path.read_text())
    }

    assert asked == set(ON_THE_WALL)


def test_an_image_that_does_not_arrive_in_time_ends_the_step_for_that_reason(
    run, coordinator, means, monkeypatch
):
    gate = threading.Event()

    def trickle(image):
        while not gate.wait(0.05):
            yield f"{image}: Downloading"

    pulls = Pulls(trickle)
    monkeypatch.setattr(
        means.executor,
        "pull",
        lambda image, *, deadline_s, progress: pulls.pull(image, deadline_s=deadline_s, progress=progress),
    )
    began = time.monotonic()

    run(limits=Limits(timeout_s=60, pull_timeout_s=1))
    gate.set()

    (said,) = coordinator.completions
    assert (said["reason"], said["infra"]) == ("pull_timeout", False)
    assert time.monotonic() - began < 5


def test_who_takes_over_a_pull_has_only_what_is_left_of_its_time(coordinator, means, state, monkeypatch):
    given, passed, first = [], [], an_attempt()

    def never(image, *, deadline_s, progress):
        if not given:
            threading.Timer(0.6, first.shut_down).start()
        given.append(deadline_s)
        passed.append(time.monotonic() - began)
        time.sleep(min(deadline_s, 1.0))
        raise StepError(Reason.PULL_TIMEOUT, f"{image} did not arrive")

    monkeypatch.setattr(means.executor, "pull", never)
    claim = a_claim(limits=Limits(timeout_s=60, pull_timeout_s=100)).model_dump(mode="json")
    journal = Journal.create(attempt_dir(state, "step-1", 1), claim)
    began = time.monotonic()
    StepRun(means, journal, first).run()

    written = Journal.create(journal.folder, claim)
    written.advance(JournalPhase.CLAIMED, pull_deadline=journal.data["pull_deadline"])
    StepRun(means, written, an_attempt()).run()

    assert 100 - passed[0] <= given[0] <= 100
    assert 90 < given[1] < given[0] - 0.5
