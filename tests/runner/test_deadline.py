"""A time limit holds over restarts of the runner, and no clock on the wall moves it."""

import json

from runner import deadline
from runner.deadline import Deadline


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
