"""Secrets reach a step through memory, whatever bytes they hold, and are gone when the script begins."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from runner.errors import StepError
from runner.executor import secret_files
from runner.executor.base import name_of
from runner.executor.launcher import make_attempt_files, read_rc
from runner.executor.secret_files import SecretFiles
from runner.journal import Journal, JournalPhase, attempt_dir
from runner.mounts import find_mount, mounts_below
from runner.state_dir import Identity, save_identity
from shared.reasons import Reason
from tests.runner.claims import a_claim
from tests.runner.runners import ADDRESS, an_agent
from tests.runner.state_folder import needs_root
from tests.runner.test_agent import Polled
from tests.runner.test_launcher import SHELLS

NASTY = (
    'it\'s "quoted" $HOME `id` \\ \\n %s ! * ~ # \r\n\t'
    + "".join(map(chr, range(1, 0x100)))
    + "é 🗝 \u2028\nEOF\n$(touch /tmp/PWN)\n\n"
)


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


@pytest.mark.threat("G06")
@pytest.mark.parametrize("may_mount", [pytest.param(True, marks=needs_root), False])
def test_a_file_half_written_by_a_life_that_was_killed_is_seen_and_removed(
    state: Path, monkeypatch: pytest.MonkeyPatch, may_mount: bool
) -> None:
    if not may_mount:
        refuse_mounts(monkeypatch)
    runner = f"half-{os.getpid()}"
    files = SecretFiles(state, runner)
    place_and_die_before_it_is_shown(files)
    heir = SecretFiles(state, runner)

    stood = heir.stands("attempt")
    heir.remove("attempt")

    assert stood
    assert not heir.stands("attempt")
    assert [left for folder in private_folders(runner) for left in folder.iterdir()] == []
    assert mounts_below(state) == []
    remove_private_folders(runner)


@pytest.mark.threat("G06")
@pytest.mark.parametrize("may_mount", [pytest.param(True, marks=needs_root), False])
def test_secrets_of_attempts_that_nobody_holds_are_swept_and_others_stay(
    state: Path, monkeypatch: pytest.MonkeyPatch, may_mount: bool
) -> None:
    if not may_mount:
        refuse_mounts(monkeypatch)
    runner = f"swept-{os.getpid()}"
    former = SecretFiles(state, runner)
    kept = former.place("held", {"A": "a"}, for_any_user=False)
    former.place("forgotten", {"A": "canary"}, for_any_user=False)
    place_and_die_before_it_is_shown(former, "half")
    files = SecretFiles(state, runner)

    files.sweep(["held"])

    assert kept.read_text() == "export A='a'\n"
    assert not any(files.stands(name) for name in ("forgotten", "half"))
    files.sweep([])
    assert [left for folder in private_folders(runner) for left in folder.iterdir()] == []
    assert mounts_below(state) == []
    remove_private_folders(runner)


@pytest.mark.threat("G06")
def test_secrets_that_lie_under_a_former_identity_are_swept_and_another_runners_stay(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_mounts(monkeypatch)
    old, new, others = (f"{name}-{os.getpid()}" for name in ("old", "new", "others"))
    was, other = SecretFiles(state, old), SecretFiles(state, others)
    adopted = was.place("adopted", {"A": "a"}, for_any_user=False)
    was.place("forgotten", {"A": "canary"}, for_any_user=False)
    other.place("forgotten", {"A": "a"}, for_any_user=False)
    files = SecretFiles(state, new, former_ids=[old, new])

    files.sweep(["adopted"])

    assert [file for folder in private_folders(old) for file in folder.iterdir()] == [adopted]
    assert files.stands("adopted") and other.stands("forgotten")
    files.remove("adopted")
    files.sweep([])
    assert private_folders(old) == []
    other.remove("forgotten")
    remove_private_folders(others)


def test_a_runner_that_registered_anew_sweeps_the_secrets_of_the_one_it_was(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_mounts(monkeypatch)
    old = f"old-{os.getpid()}"
    save_identity(state, Identity(old, "the-secret", ADDRESS))
    SecretFiles(state, old).place(name_of(old, "s1", 1), {"A": "canary"}, for_any_user=False)

    an_agent(state, Polled(), once=True).run()  # type: ignore[no-untyped-call]

    assert private_folders(old) == []


@needs_root
def test_what_this_life_has_placed_is_swept_only_when_nobody_holds_it_for_a_second_time(
    files: SecretFiles,
) -> None:
    files.place("begun meanwhile", {"A": "a"}, for_any_user=False)

    files.sweep([])
    after_one = files.stands("begun meanwhile")
    files.sweep(["begun meanwhile"])
    files.sweep([])
    after_being_held = files.stands("begun meanwhile")
    files.sweep([])

    assert (after_one, after_being_held) == (True, True)
    assert not files.stands("begun meanwhile")


def test_an_empty_place_that_a_life_was_killed_over_is_seen_and_swept(
    files: SecretFiles, state: Path
) -> None:
    (state / "secrets" / "attempt").mkdir(parents=True)

    stood = files.stands("attempt")
    files.sweep([])

    assert stood
    assert list((state / "secrets").iterdir()) == []


@needs_root
@pytest.mark.threat("G06")
def test_a_runner_removes_the_secrets_of_an_attempt_that_it_was_killed_over_once_it_was_done(
    state: Path,
) -> None:
    SecretFiles(state, "runner-1").place(name_of("runner-1", "s1", 1), {"A": "canary"}, for_any_user=False)
    journal = Journal.create(attempt_dir(state, "s1", 1), a_claim(step_id="s1").model_dump(mode="json"))
    journal.advance(JournalPhase.DONE)

    an_agent(state, Polled(), once=True).run()  # type: ignore[no-untyped-call]

    assert mounts_below(state) == []
    assert list((state / "secrets").iterdir()) == []


def place_and_die_before_it_is_shown(files: SecretFiles, name: str = "attempt") -> None:
    """In a process of its own, killed between writing the file and giving it its name."""
    child = os.fork()
    if child == 0:
        Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
        try:
            files.place(name, {"A": "canary"}, for_any_user=False)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def private_folders(runner: str) -> list[Path]:
    folders = [shared / f"buildmill-{runner}" for shared in secret_files.SHARED_FOLDERS]
    return [folder for folder in folders if folder.is_dir()]


def remove_private_folders(runner: str) -> None:
    for folder in private_folders(runner):
        folder.rmdir()


def refuse_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is for a user who may not mount."""

    def refused(target: Path, *, size: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(secret_files, "mount_tmpfs", refused)


def test_a_place_on_no_listed_file_system_is_taken_for_a_disk(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a changed root the system's list of mounts may lack the one that everything lies on."""
    refuse_mounts(monkeypatch)
    monkeypatch.setattr(secret_files, "SHARED_FOLDERS", (tmp_path,))
    monkeypatch.setattr(secret_files, "list_mounts", list)

    with pytest.raises(StepError):
        SecretFiles(state, "r").place("attempt", {"A": "canary"}, for_any_user=False)
