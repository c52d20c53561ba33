"""What an operator tells the runner of a machine, and who may."""

import os
import socket
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from runner.control import Control, NoAnswer, NobodyThere, Obedience, Standing, Word, ask
from tests.runner.state_folder import needs_root

ROOT = Path(__file__).parents[2]


class Obedient:
    """Does nothing, and remembers what it was told."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.left = threading.Event()

    @property
    def obedience(self) -> Obedience:
        return Obedience(
            standing=self.standing, drain=lambda: self.heard.append("drain"), leave=self.left.set
        )

    def standing(self) -> Standing:
        return Standing(os.getpid(), bool(self.heard), ("step s attempt 1: running",))


@pytest.fixture
def runner():
    return Obedient()


@pytest.fixture
def state(tmp_path, runner):
    """A folder whose path is longer than the address of a socket may be."""
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    with closing(Control(folder)) as control:
        control.serve(runner.obedience)
        yield folder


def test_it_says_how_it_stands_and_does_nothing(state, runner):
    told = ask(state, Word.STATUS, timeout_s=5)

    assert told == Standing(os.getpid(), False, ("step s attempt 1: running",))
    assert told.sentence == "1 step running"
    assert runner.heard == []


def test_it_drains_and_the_answer_already_says_so(state, runner):
    assert ask(state, Word.DRAIN, timeout_s=5).is_draining
    assert ask(state, Word.STATUS, timeout_s=5).is_draining
    assert runner.heard == ["drain"]
    assert not runner.left.is_set()


def test_it_leaves_only_after_its_answer_is_out(state, runner):
    assert ask(state, Word.HANDOVER, timeout_s=5).running == ("step s attempt 1: running",)
    assert runner.left.wait(5)


def test_who_asks_before_the_runner_is_ready_waits_for_it(tmp_path, runner):
    with closing(Control(tmp_path)) as control:
        threading.Timer(0.2, control.serve, [runner.obedience]).start()

        assert ask(tmp_path, Word.STATUS, timeout_s=5).running


def test_where_no_runner_is_nobody_answers(tmp_path, runner):
    with pytest.raises(NobodyThere):
        ask(tmp_path, Word.STATUS, timeout_s=5)
    with pytest.raises(NobodyThere):
        ask(tmp_path / "nowhere", Word.STATUS, timeout_s=5)

    with closing(Control(tmp_path)) as control:
        control.serve(runner.obedience)
    with pytest.raises(NobodyThere):
        ask(tmp_path, Word.STATUS, timeout_s=5)


def test_a_runner_that_hangs_is_named_within_the_time(tmp_path):
    with closing(Control(tmp_path)), pytest.raises(NoAnswer, match=r"within 0\.2 s"):
        ask(tmp_path, Word.STATUS, timeout_s=0.2)


@pytest.mark.parametrize("word", [Word.DRAIN, Word.HANDOVER])
def test_a_word_whose_caller_was_told_that_nobody_answers_is_not_obeyed_later(tmp_path, runner, word):
    with closing(Control(tmp_path)) as control:
        with pytest.raises(NoAnswer):
            ask(tmp_path, word, timeout_s=0.2)
        control.serve(runner.obedience)

        assert not ask(tmp_path, Word.STATUS, timeout_s=5).is_draining

    assert runner.heard == []
    assert not runner.left.is_set()


def test_what_a_killed_runner_left_stands_in_nobody_way(tmp_path, runner):
    Control(tmp_path)._door.close()

    with closing(Control(tmp_path)) as control:
        control.serve(runner.obedience)
        assert ask(tmp_path, Word.STATUS, timeout_s=5)


def test_the_socket_is_the_runner_own(state):
    assert stat.S_IMODE((state / "control").stat().st_mode) == 0o600


@needs_root
def test_another_user_is_refused_even_where_the_mode_lets_it_in(state, runner):
    for folder in (state, *state.parents):
        if folder.is_relative_to("/tmp/pytest-of-root"):
            folder.chmod(0o755)
    (state / "control").chmod(0o666)
    code = f"""
import os
from pathlib import Path
from runner.control import Word, ask
os.setuid(65534)
ask(Path({str(state)!r}), Word.DRAIN, timeout_s=5)
"""
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )

    assert "only root and the runner's own user are heard" in told.stderr
    assert runner.heard == []


@pytest.mark.parametrize("said", [b"", b"nonsense\n", b"[]\n", b'{"do": "dance"}\n', b"x" * 100_000])
def test_what_makes_no_sense_changes_nothing(state, runner, said):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        folder = os.open(state, os.O_PATH)
        line.connect(f"/proc/self/fd/{folder}/control")
        os.close(folder)
        try:
            line.sendall(said)
        except BrokenPipeError:
            pass  # it has read enough

    assert ask(state, Word.STATUS, timeout_s=5).running
    assert runner.heard == []
