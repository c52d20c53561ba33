import os
import stat
import subprocess
from pathlib import Path

import pytest

from runner.errors import StepError
from runner.executor.launcher import has_lost_output, launch_text, make_attempt_files, open_log, read_rc


def launch(folder: Path, script: str, shell: str = "/bin/sh") -> int:
    (folder / "script.sh").write_text(script, encoding="utf-8")
    make_attempt_files(folder, inside=str(folder))
    return subprocess.run([*shell.split(), folder / "launch.sh"], timeout=20, check=False).returncode


# busybox comes with the base images, so a machine that never had an engine lacks it.
SHELLS = [text for text in ("/bin/sh", "/bin/bash", "/usr/bin/busybox sh") if Path(text.split()[0]).exists()]


@pytest.mark.parametrize("shell", SHELLS)
def test_programs_that_open_stderr_anew_lose_no_line(tmp_path: Path, shell: str) -> None:
    script = "echo first; echo second >/dev/stderr; echo third; echo x | tee /dev/stderr; echo last; exit 7"

    code = launch(tmp_path, script, shell)

    assert (tmp_path / "log").read_text() == "first\nsecond\nthird\nx\nx\nlast\n"
    assert (code, read_rc(tmp_path)) == (7, 7)


def test_a_daemon_that_holds_stdout_delays_the_end_by_two_seconds_at_most(tmp_path: Path) -> None:
    code = launch(tmp_path, "sleep 6 & echo done; exit 3")

    assert (code, read_rc(tmp_path)) == (3, 3)
    assert (tmp_path / "log").read_text() == "done\n"


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("signal", ["KILL", "STOP"])
def test_output_that_nobody_carried_is_told_as_lost(tmp_path: Path, shell: str, signal: str) -> None:
    """As when there is no memory left and the pump is what the kernel takes."""
    look = "for c in $(cat /proc/$PPID/task/*/children); do grep -qx cat /proc/$c/comm && p=$c; done"
    script = (
        f"trap '' PIPE; until [ $p ]; do {look}; done; echo before; kill -{signal} $p; echo behind; exit 0"
    )

    launch(tmp_path, script, shell)

    assert read_rc(tmp_path) is not None
    assert has_lost_output(tmp_path)
    assert "behind" not in (tmp_path / "log").read_text()


def test_what_daemons_print_behind_the_end_is_no_loss(tmp_path: Path) -> None:
    launch(tmp_path, "sleep 6 & echo done")

    assert read_rc(tmp_path) == 0
    assert not has_lost_output(tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("end", "ended_with", "rc"), [("exit 0", 0, 0), ("exit 143", 143, 143), ("kill -9 $PPID", 137, None)]
)
def test_a_script_that_has_begun_is_not_run_again(
    tmp_path: Path, shell: str, end: str, ended_with: int, rc: int | None
) -> None:
    """Whoever starts it again gets what the first run ended with; one that was killed left nothing."""
    script = f"echo once >> {tmp_path}/runs; {end}"

    launch(tmp_path, script, shell)
    again = launch(tmp_path, script, shell)

    assert (tmp_path / "runs").read_text() == "once\n"
    assert (again, read_rc(tmp_path)) == (ended_with, rc)


def test_a_folder_with_spaces_and_quotes_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "a 'b' $c"
    folder.mkdir()

    assert launch(folder, "echo hi") == 0
    assert (folder / "log").read_text() == "hi\n"


def test_an_image_without_cat_still_gets_its_output_kept(tmp_path: Path) -> None:
    (tmp_path / "script.sh").write_text("echo out; echo err >&2; exit 4", encoding="utf-8")
    make_attempt_files(tmp_path, inside=str(tmp_path))
    text = launch_text(str(tmp_path)).replace(":/usr/bin:/bin", "")  # as if these folders held no cat

    code = subprocess.run(
        ["/bin/sh", "-c", text], env={"PATH": "/nowhere"}, timeout=20, check=False
    ).returncode

    assert (code, read_rc(tmp_path)) == (4, 4)
    assert (tmp_path / "log").read_text() == "out\nerr\n"


def test_the_files_can_be_written_by_any_user_and_the_programs_by_none(tmp_path: Path) -> None:
    (tmp_path / "script.sh").touch()

    files = make_attempt_files(tmp_path)

    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (files.log, files.rc, files.pipe, files.launch)
    }
    assert modes == {"log": 0o666, "rc": 0o666, "pipe": 0o666, "launch.sh": 0o444}
    assert stat.S_ISFIFO(files.pipe.stat().st_mode)


def test_making_the_files_again_keeps_what_was_written(tmp_path: Path) -> None:
    files = make_attempt_files(tmp_path)
    files.log.write_text("kept")

    make_attempt_files(tmp_path)

    assert files.log.read_text() == "kept"


def test_files_half_made_by_a_dead_runner_are_made_anew(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("stale")
    os.mkfifo(tmp_path / "pipe")

    files = make_attempt_files(tmp_path)

    assert files.log.read_text() == ""


@pytest.mark.parametrize(
    ("content", "rc"),
    [
        (b"0\n", 0),
        (b"137\n", 137),
        (b"", None),
        (b"0", None),
        (b"\n", None),
        (b"0\n0\n", None),
        (b"-1\n", None),
        (b" 0\n", None),
        (b"0x0\n", None),
        (b"0" * 40 + b"\n", None),
        ("\u0660\n".encode(), None),
    ],
)
def test_only_a_whole_number_counts_as_exit_code(tmp_path: Path, content: bytes, rc: int | None) -> None:
    make_attempt_files(tmp_path).rc.write_bytes(content)

    assert read_rc(tmp_path) == rc


@pytest.mark.parametrize("name", ["rc", "log"])
@pytest.mark.parametrize("trick", ["link", "other", "fifo", "gone"])
def test_a_replaced_file_is_never_read(tmp_path: Path, name: str, trick: str) -> None:
    make_attempt_files(tmp_path).rc.write_bytes(b"0\n")
    path = tmp_path / name
    path.rename(tmp_path / "kept")  # else its number may be given to the next file
    secret = tmp_path / "secret"
    secret.write_bytes(b"0\n")
    if trick == "link":
        path.symlink_to(secret)
    elif trick == "other":
        path.write_bytes(b"0\n")
    elif trick == "fifo":
        os.mkfifo(path)

    if name == "rc":
        assert read_rc(tmp_path) is None
    else:
        with pytest.raises(StepError):
            open_log(tmp_path)


def test_the_log_is_opened_when_it_is_ours(tmp_path: Path) -> None:
    make_attempt_files(tmp_path).log.write_text("hi")

    descriptor = open_log(tmp_path)

    with os.fdopen(descriptor) as log:
        assert log.read() == "hi"
