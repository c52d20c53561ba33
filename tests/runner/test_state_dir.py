"""The runner's folder belongs to one process, and remembers who it is and what it asked."""

import fcntl
import os
import shutil
import stat
import subprocess
import sys

import pytest

from runner.errors import BadSetup
from runner.state_dir import Identity, PendingRequest, StateLock, former_ids, load_identity, save_identity

IDENTITY = Identity("r1", "very-secret", "http://localhost:3000")


def test_a_second_runner_is_refused_with_the_remedy(tmp_path):
    told = rf"process {os.getpid()}\) uses .*--state"
    with StateLock(tmp_path / "state"), pytest.raises(BadSetup, match=told):
        StateLock(tmp_path / "state")

    StateLock(tmp_path / "state").release()


def test_a_folder_below_the_one_of_another_runner_is_refused(tmp_path):
    with StateLock(tmp_path / "state"):
        save_identity(tmp_path / "state", IDENTITY)
        with pytest.raises(BadSetup, match=r"below .*/state, which another runner uses.*--state"):
            StateLock(tmp_path / "state" / "deep" / "second")

    StateLock(tmp_path / "state" / "deep" / "second").release()


def test_a_folder_below_the_one_of_a_coordinator_is_not_refused(tmp_path):
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        StateLock(tmp_path / "runner").release()


def test_a_dead_runner_holds_nothing(tmp_path):
    code = f"""
import os
from pathlib import Path
from runner.state_dir import StateLock
lock = StateLock(Path({str(tmp_path)!r}))
print(os.getpid(), flush=True)
os.kill(os.getpid(), 9)
"""
    killed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert killed.returncode == -9
    assert (tmp_path / "lock").read_text() == killed.stdout

    with StateLock(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(BadSetup, match="cannot be used"):
        StateLock(tmp_path / "file" / "state")


def test_the_identity_is_kept_for_its_owner_only(tmp_path):
    assert load_identity(tmp_path) is None

    save_identity(tmp_path, IDENTITY)

    assert load_identity(tmp_path) == IDENTITY
    assert stat.S_IMODE((tmp_path / "identity.json").stat().st_mode) == 0o600
    assert "very-secret" not in repr(IDENTITY)


def test_a_folder_knows_its_former_runners_also_when_the_identity_was_removed(tmp_path):
    assert former_ids(tmp_path) == []
    for name in ("r1", "r2"):
        save_identity(tmp_path, Identity(name, "very-secret", "http://localhost:3000"))
        (tmp_path / "identity.json").unlink()

    assert former_ids(tmp_path) == ["r1", "r2"]
    assert "very-secret" not in (tmp_path / "runner-ids.json").read_text()


def test_a_copy_of_a_folder_does_not_own_what_the_originals_runner_began(tmp_path):
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    save_identity(original, IDENTITY)
    shutil.copytree(original, copy)
    (copy / "identity.json").unlink()

    save_identity(copy, Identity("r2", "another-secret", "http://localhost:3000"))

    assert former_ids(copy) == ["r2"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"ids": 7, "folder": 1}'])
def test_damaged_former_ids_are_forgotten(tmp_path, content):
    (tmp_path / "runner-ids.json").write_text(content)

    assert former_ids(tmp_path) == []


def test_an_identity_that_others_may_read_is_refused(tmp_path):
    save_identity(tmp_path, IDENTITY)
    (tmp_path / "identity.json").chmod(0o640)

    with pytest.raises(BadSetup, match="chmod 600"):
        load_identity(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"runnerId": "r1"}', '{"runnerId":"","secret":1,"coordinator":2}']
)
def test_a_damaged_identity_is_told_with_the_remedy(tmp_path, content):
    save_identity(tmp_path, IDENTITY)
    (tmp_path / "identity.json").write_text(content)

    with pytest.raises(BadSetup, match="remove it"):
        load_identity(tmp_path)


def test_an_identity_behind_a_link_is_not_read(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    save_identity(tmp_path / "elsewhere", IDENTITY)
    (tmp_path / "identity.json").symlink_to(tmp_path / "elsewhere" / "identity.json")

    with pytest.raises(BadSetup, match="cannot be read"):
        load_identity(tmp_path)


def test_a_request_keeps_its_id_until_it_is_answered(tmp_path):
    request = PendingRequest(tmp_path)

    assert request.current("first") == "first"
    assert request.current("second") == "first"
    assert PendingRequest(tmp_path).current("third") == "first"
    request.answered()
    assert request.find() is None
    assert request.current("fourth") == "fourth"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"requestId": 7}'])
def test_a_damaged_request_is_forgotten(tmp_path, content):
    (tmp_path / "requests.json").write_text(content)

    assert PendingRequest(tmp_path).current("next") == "next"
