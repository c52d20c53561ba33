"""Secrets reach a step through memory, whatever bytes they hold, and are gone when the script begins."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.errors import StepError
from runner.executor import secret_files
from runner.executor.launcher import make_attempt_files, read_rc
from runner.executor.secret_files import SecretFiles
from runner.mounts import find_mount, mounts_below
from shared.reasons import Reason
from tests.runner.state_folder import a_state_folder, needs_root
from tests.runner.test_launcher import SHELLS

NASTY = (
    'it\'s "quoted" $HOME `id` \\ \\n %s ! * ~ # \r\n\t'
    + "".join(map(chr, range(1, 0x100)))
    + "é 🗝 \u2028\nEOF\n$(touch /tmp/PWN)\n\n"
)


@pytest.fixture
def state() -> Iterator[Path]:
    with a_state_folder() as folder:
        yield folder


@pytest.fixture
def files(state: Path) -> SecretFiles:
    return SecretFiles(state, "test-runner")


def run(folder: Path, shell: str, script: str) -> int:
    (folder / "script.sh").write_text(script, encoding="utf-8")
    make_attempt_files(folder, inside=str(folder))
    return subprocess.run([*shell.split(), folder / "launch.sh"], timeout=20, check=False).returncode


@pytest.mark.threat("G06")
@pytest.mark.parametrize("shell", SHELLS)
def test_every_byte_of_a_value_arrives_and_the_file_is_empty_then(
    files: SecretFiles, tmp_path: Path, shell: str
) -> None:
    placed = files.place("attempt", {"NASTY": NASTY, "PLAIN": "x"}, for_any_user=False)
    (tmp_path / "secrets").symlink_to(placed)
    script = f'printf %s "$NASTY" >{tmp_path}/came; wc -c <{placed} >{tmp_path}/left; env >{tmp_path}/env'

    assert run(tmp_path, shell, script) == 0

    assert (tmp_path / "came").read_bytes() == NASTY.encode()
    assert (tmp_path / "left").read_text().split() == ["0"]
    assert b"\nPLAIN=x\n" in b"\n" + (tmp_path / "env").read_bytes()
    assert not Path("/tmp/PWN").exists()
    files.remove("attempt")


@pytest.mark.parametrize("content", ["", "directory"])
def test_a_script_that_lacks_its_secrets_does_not_begin(tmp_path: Path, content: str) -> None:
    (tmp_path / "secrets").mkdir() if content else (tmp_path / "secrets").touch()

    code = run(tmp_path, "/bin/sh", f"touch {tmp_path}/began")

    assert code != 0
    assert read_rc(tmp_path) is None
    assert not (tmp_path / "began").exists()


@needs_root
def test_a_file_lies_in_memory_behind_a_closed_folder_and_goes_with_its_mount(
    files: SecretFiles, state: Path
) -> None:
    mine = files.place("one", {"A": "a"}, for_any_user=False)
    open_to_all = files.place("two", {"A": "a"}, for_any_user=True)

    assert {find_mount(path.parent).kind for path in (mine, open_to_all)} == {"tmpfs"}  # type: ignore[union-attr]
    assert (mine.stat().st_mode & 0o777, open_to_all.stat().st_mode & 0o777) == (0o600, 0o666)
    assert (state / "secrets").stat().st_mode & 0o077 == 0
    assert all(path.parent.stat().st_mode & 0o077 == 0 for path in (mine, open_to_all))

    files.remove("one")
    files.remove("two")
    files.remove("two")

    assert mounts_below(state) == []
    assert list((state / "secrets").iterdir()) == []


@needs_root
def test_a_step_that_fills_its_file_leaves_room_for_the_next(files: SecretFiles) -> None:
    greedy = files.place("greedy", {"A": "a"}, for_any_user=False)
    with pytest.raises(OSError, match="No space"), greedy.open("wb", buffering=0) as file:
        for _ in range(64):
            file.write(b"x" * 65536)

    other = files.place("other", {"A": "b" * 65536}, for_any_user=False)

    assert other.stat().st_size > 65536
    files.remove("greedy")
    files.remove("other")


def test_what_was_read_is_removed_and_what_was_not_stays(files: SecretFiles, state: Path) -> None:
    placed = files.place("attempt", {"A": "a"}, for_any_user=False)

    files.remove_read("attempt")
    stayed = placed.exists()
    os.truncate(placed, 0)
    files.remove_read("attempt")

    assert stayed
    assert not placed.exists()
    files.remove_read("attempt")


def test_another_life_finds_and_replaces_what_was_placed(files: SecretFiles, state: Path) -> None:
    first = files.place("attempt", {"A": "old"}, for_any_user=False)
    heir = SecretFiles(state, "test-runner")

    assert heir.place("attempt", {"A": "new"}, for_any_user=False) == first
    assert first.read_text() == "export A='new'\n"

    heir.remove("attempt")
    assert not first.exists()


def test_where_no_tmpfs_can_be_mounted_a_private_folder_in_memory_serves(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_mounts(monkeypatch)
    files = SecretFiles(state, f"test-{os.getpid()}")

    placed = files.place("attempt", {"A": "a"}, for_any_user=False)

    assert placed.parent.name == f"buildmill-test-{os.getpid()}"
    assert placed.parent.stat().st_mode & 0o777 == 0o700
    files.remove("attempt")
    assert list(placed.parent.iterdir()) == []
    placed.parent.rmdir()


def test_nothing_is_ever_written_to_a_disk(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_mounts(monkeypatch)
    monkeypatch.setattr(secret_files, "SHARED_FOLDERS", (tmp_path,))

    with pytest.raises(StepError) as caught:
        SecretFiles(state, "r").place("attempt", {"A": "canary"}, for_any_user=False)

    assert caught.value.reason is Reason.INTERNAL
    assert not [path for folder in (state, tmp_path) for path in folder.rglob("*") if path.is_file()]


def test_a_folder_that_somebody_else_prepared_is_not_used(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_mounts(monkeypatch)
    open_to_all = Path("/dev/shm") / f"buildmill-trap-{os.getpid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setattr(secret_files, "SHARED_FOLDERS", (Path("/dev/shm"),))
    try:
        with pytest.raises(StepError):
            SecretFiles(state, f"trap-{os.getpid()}").place("a", {"A": "canary"}, for_any_user=False)
        assert list(open_to_all.iterdir()) == []
    finally:
        open_to_all.rmdir()


def refuse_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for a user who may not mount."""

    def refused(target: Path, *, size: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(secret_files, "mount_tmpfs", refused)
