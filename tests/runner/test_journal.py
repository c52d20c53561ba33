"""A killed runner reads from its journals what it has done."""

import json
import multiprocessing
import os
import signal
import stat

import pytest

from runner.errors import StepError
from runner.journal import Journal, JournalPhase, attempt_dir, open_journals
from shared.reasons import Reason

CLAIM = {"stepId": "s1", "attempt": 2, "lease": "x"}


@pytest.fixture
def folder(tmp_path):
    return attempt_dir(tmp_path, "s1", 2)


def test_what_was_recorded_is_there_in_the_next_life(folder):
    journal = Journal.create(folder, CLAIM)
    journal.advance(JournalPhase.RUNNING, container="c1", startedAt="2026-01-01T00:00:00.000Z")
    journal.record(log={"device": 1, "inode": 2})
    journal.advance(JournalPhase.EXITED, rc=0)

    loaded = Journal.load(folder)

    assert (loaded.phase, loaded.claim) == (JournalPhase.EXITED, CLAIM)
    assert loaded.data == {
        "container": "c1",
        "startedAt": "2026-01-01T00:00:00.000Z",
        "log": {"device": 1, "inode": 2},
        "rc": 0,
    }
    assert (loaded.step_id, loaded.attempt, loaded.folder) == ("s1", 2, folder)


def test_a_phase_never_goes_back(folder):
    journal = Journal.create(folder, CLAIM)
    for phase in JournalPhase:
        journal.advance(phase)
        journal.advance(phase)

    with pytest.raises(ValueError, match="does not go back"):
        journal.advance(JournalPhase.RUNNING, rc=1)

    assert Journal.load(folder).phase is JournalPhase.DONE
    assert Journal.load(folder).data == {}


def test_the_journal_is_for_its_owner_only(folder):
    old = os.umask(0)
    try:
        journal = Journal.create(folder, CLAIM)
    finally:
        os.umask(old)

    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


TORN = [b"", b"{", b'{"version": 1, "phase": "run', b"null", b"[]", b"\xff\xfe", b"[" * 100_000]
WRONG = [
    {"version": 1, "phase": "flying", "claim": {}, "data": {}},
    {"version": 2, "phase": "done", "claim": {}, "data": {}},
    {"version": 1, "phase": "done", "claim": [], "data": {}},
]


@pytest.mark.parametrize("content", [*TORN, *(json.dumps(wrong).encode() for wrong in WRONG)])
def test_a_torn_journal_is_set_aside(folder, content):
    folder.mkdir(parents=True)
    for _ in range(2):
        (folder / "journal.json").write_bytes(content)

        assert Journal.load(folder) is None
        assert not (folder / "journal.json").exists()

    asides = sorted(folder.iterdir())
    assert [aside.name for aside in asides] == ["journal.json.unreadable-1", "journal.json.unreadable-2"]
    assert asides[0].read_bytes() == content


def test_without_a_journal_there_is_none(folder):
    assert Journal.load(folder) is None


def test_open_journals_are_those_not_done(tmp_path):
    for step_id, attempt, phase in (
        ("s2", 1, JournalPhase.RUNNING),
        ("s1", 10, JournalPhase.CLAIMED),
        ("s1", 9, JournalPhase.COMPLETING),
        ("s3", 1, JournalPhase.DONE),
    ):
        Journal.create(attempt_dir(tmp_path, step_id, attempt), CLAIM).advance(phase)
    attempt_dir(tmp_path, "empty", 1).mkdir(parents=True)
    (tmp_path / "a" / "s1" / "stray").mkdir()
    (tmp_path / "a" / "file").write_text("")

    found = [(journal.step_id, journal.attempt) for journal in open_journals(tmp_path)]

    assert found == [("s1", 9), ("s1", 10), ("s2", 1)]
    assert open_journals(tmp_path / "nothing") == []


@pytest.mark.threat("D01")
@pytest.mark.parametrize("step_id", ["", ".", "..", "a/b", "../x", "a\0b", "x" * 65, "é", "a.b"])
def test_only_ids_become_folders(tmp_path, step_id):
    with pytest.raises(ValueError, match="not a step"):
        attempt_dir(tmp_path, step_id, 1)
    with pytest.raises(ValueError, match="not a step"):
        attempt_dir(tmp_path, "fine", 0)


@pytest.mark.threat("D22")
def test_a_full_disk_is_told_and_the_last_word_stays(folder, monkeypatch):
    journal = Journal.create(folder, CLAIM)
    journal.advance(JournalPhase.EXITED, rc=0)

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runner.durable.os.write", refuse)
    with pytest.raises(StepError) as caught:
        journal.advance(JournalPhase.COMPLETING, body={})
    monkeypatch.undo()

    assert caught.value.reason is Reason.DISK_FULL
    assert journal.phase is JournalPhase.COMPLETING
    assert Journal.load(folder).phase is JournalPhase.EXITED


def _write_for_ever(folder, ready):
    journal = Journal.create(folder, CLAIM)
    number = 0
    while True:
        number += 1
        journal.record(number=number, copy=number, filler="x" * 100_000)
        ready.set()


@pytest.mark.timeout(60)
def test_a_runner_killed_while_it_writes_leaves_a_whole_journal(folder):
    context = multiprocessing.get_context("spawn")
    last = 0
    for _ in range(3):
        ready = context.Event()
        writer = context.Process(target=_write_for_ever, args=(folder, ready))
        writer.start()
        assert ready.wait(30)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(10)
        writer.close()

        journal = Journal.load(folder)

        assert journal.data["number"] == journal.data["copy"] > 0
        last = journal.data["number"]
    assert last > 0
