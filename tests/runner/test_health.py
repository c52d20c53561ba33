"""A machine that fails steps takes none for a while, and says so; one that works goes on."""

import itertools
import json
import time

import pytest

from runner.disk import DiskGuard
from runner.executor.images import registry_of
from runner.health import Condition, Health, Tried

FAILED = {"status": "failed", "reason": "daemon_error"}
NOT_PULLED = {"status": "failed", "reason": "pull_network"}
STEPS = map(str, itertools.count())
SUCCEEDED = {"status": "success", "exitCode": 0}


class BootClock:
    """The seconds since this machine was booted, as far as the tests are concerned."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self, _clock: int) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = BootClock()
    monkeypatch.setattr(time, "clock_gettime", made)
    return made


@pytest.fixture
def new_health(state, clock):
    def new(reserve_bytes=0):
        return Health(state, DiskGuard(state, reserve_bytes))

    return new


def fail(health, times=1, completion=FAILED, **tried):
    """Each time another step."""
    return [health.note_completion(completion, Tried(next(STEPS), **tried)) for _ in range(times)]


def fail_to_pull(health, *images):
    """Whether a pause began with the last of them, each of another step."""
    return [fail(health, completion=NOT_PULLED, registry=registry_of(image)) for image in images][-1] == [
        True
    ]


def test_three_failures_of_the_machine_in_a_row_pause_it_for_a_minute(new_health):
    health = new_health()

    began = fail(health, 3)

    assert began == [False, False, True]
    assert not health.may_take_steps()
    assert health.condition().paused_for_s == 60
    assert "daemon_error" in health.condition().pause_reason


def test_the_pause_ends_by_itself_and_doubles_up_to_a_quarter_of_an_hour_while_failures_go_on(
    new_health, clock
):
    health = new_health()
    fail(health, 2)
    lengths = []

    for _ in range(6):
        fail(health)
        lengths.append(health.condition().paused_for_s)
        clock.now += lengths[-1] + 1
        assert health.may_take_steps()

    assert lengths == [60, 120, 240, 480, 900, 900]


@pytest.mark.parametrize("proof", [SUCCEEDED, {"status": "failed", "reason": "exit_nonzero", "exitCode": 3}])
def test_one_script_that_ran_to_its_end_begins_the_count_anew(new_health, clock, proof):
    health = new_health()
    fail(health, 4)
    clock.now += 1000

    health.note_completion(proof, Tried("works"))
    fail(health, 2)

    assert health.may_take_steps()
    fail(health)
    assert health.condition().paused_for_s == 60


@pytest.mark.parametrize("reason", ["runner_shutdown", "cancelled", "image_not_found", "pull_timeout"])
def test_what_says_nothing_of_the_machine_neither_counts_nor_clears(new_health, reason):
    health = new_health()
    fail(health, 2)

    fail(health, 5, {"status": "failed", "reason": reason, "exitCode": None})

    assert health.may_take_steps()
    assert fail(health) == [True]


def test_one_step_that_fails_again_and_again_pauses_nothing(new_health):
    health = new_health()

    began = [health.note_completion(FAILED, Tried("the-same")) for _ in range(10)]

    assert not any(began)
    assert new_health().may_take_steps()


def test_one_registry_that_cannot_be_reached_pauses_nothing(new_health):
    health = new_health()

    assert not fail_to_pull(health, *(f"typo.invalid/app:{number}" for number in range(10)))
    assert new_health().may_take_steps()


@pytest.mark.parametrize("others", [["b.example/x", "app"], ["localhost:5000/x", "docker.io/app"]])
def test_a_network_on_which_no_registry_is_reached_pauses(new_health, others):
    assert fail_to_pull(new_health(), "a.example/x", *others)


def test_a_pull_that_works_shows_that_the_network_does(new_health):
    health = new_health()
    fail_to_pull(health, "a.example/x", "a.example/y")
    fail(health, has_image=True)

    assert not fail_to_pull(health, "b.example/x")
    assert health.may_take_steps()
    assert fail_to_pull(health, "a.example/x")


def test_steps_that_fail_while_it_pauses_do_not_make_the_pause_longer(new_health, clock):
    health = new_health()
    fail(health, 3)
    clock.now += 10

    fail(health, 5)

    assert health.condition().paused_for_s == 50


def test_a_pause_survives_a_restart_of_the_runner(new_health, clock):
    fail(new_health(), 3)
    clock.now += 20

    heir = new_health()

    assert heir.condition().paused_for_s == 40
    clock.now += 41
    assert heir.may_take_steps()
    fail(heir)
    assert heir.condition().paused_for_s == 120


def test_a_jump_of_the_wall_clock_moves_no_pause(new_health, clock, monkeypatch):
    health = new_health()
    fail(health, 3)

    monkeypatch.setattr(time, "time", lambda: 4e9)

    assert health.condition().paused_for_s == 60
    assert new_health().condition().paused_for_s == 60


@pytest.mark.parametrize("content", ["", "{", "[]", '{"failures": 3}', '{"failures": -1, "pauseS": "x"}'])
def test_a_damaged_record_is_as_good_as_none(state, new_health, content):
    (state / "health.json").write_text(content)

    assert new_health().condition() == Condition()


def test_a_record_cannot_pause_it_for_longer_than_any_pause_lasts(state, new_health):
    fail(new_health(), 3)
    said = json.loads((state / "health.json").read_text())
    said["until"]["at_s"] += 10**9
    said["pauseS"] = 10**9
    (state / "health.json").write_text(json.dumps(said))

    assert new_health().condition().paused_for_s <= 900


def test_it_says_once_why_it_takes_no_steps_and_when_it_goes_on(new_health, clock, capsys):
    health = new_health()
    fail(health, 3)

    asked = [health.may_take_steps() for _ in range(3)]
    clock.now += 61
    asked += [health.may_take_steps() for _ in range(3)]

    assert asked == [False] * 3 + [True] * 3
    said = capsys.readouterr().out
    assert said.count("no_steps_taken") == 1
    assert said.count("steps_taken_again") == 1


def test_a_short_disk_is_told_in_the_heartbeat(new_health):
    assert new_health(reserve_bytes=2**62).condition() == Condition(low_disk=True)
    assert not new_health(reserve_bytes=2**62).may_take_steps()
