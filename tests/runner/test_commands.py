"""What an operator sees who drains a runner or hands it over, and what the exit code says."""

import os
import threading
from contextlib import ExitStack, closing

import pytest
from click.testing import CliRunner

from runner.cli import runner
from runner.commands import NO_ANSWER, NOBODY, STEPS_LEFT, take_over
from runner.control import Control, Obedience, Standing
from runner.errors import BadSetup
from runner.journal import Journal, attempt_dir
from runner.state_dir import StateLock


class Living:
    """A runner as far as its folder shows: a lock, a socket, and steps that a test lets end."""

    def __init__(self, state):
        self.running = ["step s attempt 1: running"]
        self.drained = threading.Event()
        self.has_told_of_none = threading.Event()
        self._state = state
        self._held = ExitStack()
        lock, control = StateLock(state), Control(state)
        self._held.callback(control.close)
        self._held.callback(lock.release)  # the first to go, as with a process that ends at once
        control.serve(Obedience(standing=self.standing, drain=self.drained.set, leave=self.end))

    def standing(self):
        if not self.running:
            self.has_told_of_none.set()
        return Standing(os.getpid(), self.drained.is_set(), tuple(self.running))

    def end(self):
        self._held.close()


@pytest.fixture
def living(tmp_path):
    made = Living(tmp_path)
    yield made
    made.end()


@pytest.fixture
def say(tmp_path):
    def say(*words):
        answer = CliRunner().invoke(runner, [*words, "--state", str(tmp_path)])
        return answer.exit_code, answer.output

    return say


def test_drain_orders_and_comes_back_at_once(living, say):
    assert say("drain") == (0, "draining: 1 step running\n")
    assert living.drained.wait(10)  # the answer is out a moment before it is obeyed


def test_drain_that_waits_tells_what_still_runs_until_the_end(living, say):
    def end_one_by_one():
        living.drained.wait(10)
        living.running = []
        living.has_told_of_none.wait(10)
        living.end()

    threading.Thread(target=end_one_by_one).start()
    code, output = say("drain", "--wait")

    assert code == 0
    assert output.splitlines()[-2:] == ["0 steps running", "drained: the runner has ended"]


def test_drain_that_waits_in_vain_says_that_steps_still_run(living, say):
    code, output = say("drain", "--wait", "--timeout", "0.2")

    assert code == STEPS_LEFT
    assert "steps still run after 0.2 s" in output


def test_a_runner_that_is_killed_while_it_drains_was_not_drained(living, say, tmp_path):
    def kill():
        living.drained.wait(10)
        living.end()

    Journal.create(attempt_dir(tmp_path, "step-1", 1), {})
    threading.Thread(target=kill).start()

    code, output = say("drain", "--wait")

    assert code == STEPS_LEFT
    assert "left 1 steps to its next process" in output


def test_handover_comes_back_when_the_folder_is_free(living, say, tmp_path):
    assert say("handover") == (
        0,
        "handed over: 1 step running; start the next process within 60 s\n",
    )
    StateLock(tmp_path).release()


@pytest.mark.parametrize("word", ["drain", "handover"])
def test_where_no_runner_is_the_exit_code_says_so(say, tmp_path, word):
    assert say(word) == (NOBODY, f"no runner uses {tmp_path}\n")


def test_a_runner_that_hangs_is_one_line(say, tmp_path, monkeypatch):
    monkeypatch.setattr("runner.commands.ANSWER_S", 0.1)
    with closing(Control(tmp_path)):
        code, output = say("handover")

    assert code == NO_ANSWER
    assert output == f"the runner of {tmp_path} does not answer within 0.1 s\n"


def test_options_of_the_runner_are_not_taken_for_those_of_a_command(tmp_path):
    answer = CliRunner().invoke(runner, ["--state", str(tmp_path), "drain"])

    assert answer.exit_code == 2
    assert "options stand behind the word drain" in answer.output


def test_who_takes_over_gets_the_folder_of_one_that_leaves(living, tmp_path, capsys):
    with take_over(tmp_path, patience_s=10):
        assert capsys.readouterr().out == "handed over: 1 step running\n"


def test_who_takes_over_where_nobody_is_just_begins(tmp_path):
    take_over(tmp_path, patience_s=0.1).release()


def test_who_takes_over_waits_for_one_that_has_not_opened_its_door_yet(tmp_path):
    with ExitStack() as begun:
        lock = begun.enter_context(StateLock(tmp_path))
        threading.Timer(0.3, lock.release).start()
        begun.pop_all()

        take_over(tmp_path, patience_s=10).release()


def test_who_takes_over_from_one_that_hangs_is_told_what_to_do(tmp_path):
    told = pytest.raises(BadSetup, match=r"nobody hands over within 0\.3 s.*signal KILL ends no step")
    with StateLock(tmp_path), closing(Control(tmp_path)), told:
        take_over(tmp_path, patience_s=0.3)
