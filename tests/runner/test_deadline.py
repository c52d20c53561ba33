"""A time limit holds over restarts of the runner, and no clock on the wall moves it."""

import json

import pytest

from runner import deadline
from runner.deadline import Deadline, Moment, Silence


def test_a_successor_counts_on_from_where_the_first_began():
    first = Deadline.after(100)

    second = Deadline.recorded(json.loads(json.dumps(first.record())), otherwise_s=5000)

    assert second == first
    assert 99 < second.left_s() <= 100


def test_after_a_restart_of_the_machine_it_begins_anew(monkeypatch):
    recorded = Deadline.after(100).record()
    monkeypatch.setattr(deadline, "boot_id", lambda: "another boot")

    assert 4999 < Deadline.recorded(recorded, otherwise_s=5000).left_s() <= 5000


def test_one_that_was_never_written_down_begins_now():
    assert 49 < Deadline.recorded(None, otherwise_s=50).left_s() <= 50


def test_one_that_has_passed_stays_passed():
    assert Deadline.recorded(Deadline.after(-5).record(), otherwise_s=50).left_s() < 0


def test_silence_is_counted_from_the_last_growth_of_the_log(clock):
    silence = Silence(10, None, size=0)

    clock.pass_s(9)
    silence.look(5)
    clock.pass_s(9)

    assert not silence.is_too_long
    clock.pass_s(1)
    assert silence.is_too_long


def test_silence_goes_on_over_a_restart_where_nothing_was_printed(clock):
    written = Silence(10, None, size=7).look(7)
    clock.pass_s(6)

    taken_over = Silence(10, json.loads(json.dumps(written)), size=7)
    clock.pass_s(4)

    assert taken_over.is_too_long


def test_silence_begins_anew_where_something_was_printed_meanwhile(clock):
    written = Silence(10, None, size=7).look(7)
    clock.pass_s(6)

    taken_over = Silence(10, json.loads(json.dumps(written)), size=8)
    clock.pass_s(9)

    assert not taken_over.is_too_long


def test_a_talking_step_is_written_down_seldom(clock):
    silence, written = Silence(100, None, size=0), 0
    for second in range(1000):
        written += silence.look(second) is not None
        clock.pass_s(1)

    assert 10 <= written <= 41


def test_an_age_grows_and_survives_until_the_machine_boots(clock, monkeypatch):
    said = json.loads(json.dumps(Moment.now().record()))
    clock.pass_s(5)

    assert Moment.recorded(said).age_s() == 5
    monkeypatch.setattr(deadline, "boot_id", lambda: "another boot")
    assert Moment.recorded(said) is None
    assert Moment.recorded(None) is None


@pytest.fixture
def clock(monkeypatch):
    """The clock that counts from the machine's boot, in the test's hands."""
    clock = Clock()
    monkeypatch.setattr(deadline, "boot_s", lambda: clock.s)
    return clock


class Clock:
    def __init__(self):
        self.s = 1000.0

    def pass_s(self, seconds):
        self.s += seconds
