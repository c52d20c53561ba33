"""What a step hands on is collected without believing the tree it left."""

import hashlib
import json
import os
import resource
import socket
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest

from runner import artifacts, beneath
from runner.artifacts import collect
from runner.blobs import LocalBlobs
from runner.errors import StepError
from shared.reasons import Reason

IS_ROOT = os.geteuid() == 0
GIB = 1 << 30


@pytest.fixture
def workspace(tmp_path):
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.fixture
def blobs(tmp_path):
    return LocalBlobs(tmp_path / "blobs", max_bytes=1 << 40)


@pytest.fixture(params=["openat2", "by component"])
def _each_way_to_open(request, monkeypatch):
    if request.param == "by component":
        monkeypatch.setattr(beneath, "_HAS_OPENAT2", False)
    elif not beneath._HAS_OPENAT2:
        pytest.skip("this kernel has no openat2")


both_ways = pytest.mark.usefixtures("_each_way_to_open")


def gather(workspace, blobs, *patterns, max_files=20_000, max_bytes=GIB):
    return collect(
        workspace, patterns, max_files=max_files, max_bytes=max_bytes, store=blobs and blobs.put_fd
    )


def write(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def paths(collected) -> list[str]:
    return [entry.path for entry in collected.entries]


@both_ways
def test_files_links_and_empty_folders_are_collected_in_order(workspace, blobs):
    write(workspace / "out/b.txt", b"two").chmod(0o755)
    write(workspace / "out/a.txt", b"one").chmod(0o640)
    (workspace / "out/empty").mkdir()
    (workspace / "out/deep").mkdir()
    (workspace / "out/deep/link").symlink_to("../a.txt")
    write(workspace / "other")

    collected = gather(workspace, blobs, "out")

    assert [(e.path, e.type, e.mode, e.size, e.target) for e in collected.entries] == [
        ("out/a.txt", "file", 0o640, 3, ""),
        ("out/b.txt", "file", 0o755, 3, ""),
        ("out/deep/link", "link", 0o777, 0, "../a.txt"),
        ("out/empty", "directory", stat.S_IMODE((workspace / "out/empty").stat().st_mode), 0, ""),
    ]
    assert collected.entries[0].sha256 == hashlib.sha256(b"one").hexdigest()
    assert blobs.path(collected.entries[1].sha256).read_bytes() == b"two"
    assert (collected.missing, collected.warnings, collected.total_bytes) == ((), (), 6)


def test_a_path_that_is_not_there_is_missing_and_a_pattern_without_match_only_warns(workspace, blobs):
    write(workspace / "here/x")

    collected = gather(workspace, blobs, "gone.txt", "here/gone", "*.whl", "here", "./here/x")

    assert paths(collected) == ["here/x"]
    assert collected.missing == ("gone.txt", "here/gone")
    assert collected.warnings == ("*.whl matches nothing",)


def test_patterns_take_what_they_say_and_no_more(workspace, blobs):
    for name in ("a.log", "sub/b.log", "sub/deep/c.log", "sub/d.txt", ".hidden.log"):
        write(workspace / name)

    assert paths(gather(workspace, blobs, "*.log")) == [".hidden.log", "a.log"]
    assert paths(gather(workspace, blobs, "sub/**")) == ["sub/b.log", "sub/d.txt", "sub/deep/c.log"]
    assert paths(gather(workspace, blobs, "**/c.log", "sub/?.txt")) == ["sub/d.txt", "sub/deep/c.log"]
    shallow = gather(workspace, blobs, "sub/*")
    assert paths(shallow) == ["sub/b.log", "sub/d.txt"]
    assert shallow.warnings == (
        "sub/deep is a folder with content that no pattern takes; name it with /** behind",
    )


def test_no_patterns_collect_nothing(workspace, blobs):
    write(workspace / "x")

    assert gather(workspace, blobs).entries == ()


@pytest.mark.threat("D01")
@pytest.mark.parametrize("pattern", ["..", "../x", "/etc/passwd", "a/../../b", "", ".", ".git/config"])
def test_paths_that_leave_the_workspace_are_refused(workspace, blobs, pattern):
    with pytest.raises(StepError) as caught:
        gather(workspace, blobs, pattern)

    assert caught.value.reason is Reason.BAD_CONFIG


@pytest.mark.threat("H10")
def test_no_git_folder_is_ever_collected(workspace, blobs):
    for name in (".git/config", "vendor/lib/.git/hooks/post-checkout", "vendor/lib/code.c"):
        write(workspace / name)
    write(workspace / "vendor/module/.git")

    collected = gather(workspace, blobs, "**")

    assert paths(collected) == ["vendor/lib/code.c", "vendor/module"]
    assert collected.warnings == (
        "vendor/lib/.git is never handed on",
        "vendor/module/.git is never handed on",
    )


@pytest.mark.threat("D03")
def test_twin_names_stay_apart_and_are_pointed_out(workspace, blobs):
    for name in ("é", "e\u0301", "README", "readme", "K", "\u212a"):
        write(workspace / "out" / name, name.encode())

    collected = gather(workspace, blobs, "out")

    assert len(collected.entries) == len({entry.sha256 for entry in collected.entries}) == 6
    assert sum("one name on some systems" in warning for warning in collected.warnings) == 3


@both_ways
@pytest.mark.threat("D04")
@pytest.mark.parametrize(
    "target",
    ["/etc", "/etc/passwd", "../../etc", "..", "../..", "sub/../../../etc/passwd", "sub/..", "./../../x"],
)
def test_links_that_lead_out_are_neither_followed_nor_kept(workspace, blobs, target):
    (workspace / "out/sub").mkdir(parents=True)
    link = workspace / "out" / "link"
    link.symlink_to(target)

    collected = gather(workspace, blobs, "out/link", "out/**")

    if target == "..":  # the workspace itself is inside
        assert paths(collected) == ["out/link", "out/sub"]
        return
    assert paths(collected) == ["out/sub"]
    assert collected.missing == ("out/link",)
    assert any("points out of the workspace" in warning for warning in collected.warnings)


@both_ways
@pytest.mark.threat("D04")
def test_what_lies_behind_a_linked_folder_is_not_reached(workspace, blobs, tmp_path):
    secret = write(tmp_path / "outside/secret", b"foreign")
    (workspace / "out").symlink_to(secret.parent)
    (workspace / "loop").symlink_to("loop")
    for n in range(41):
        (workspace / f"chain{n}").symlink_to(f"chain{n + 1}")

    collected = gather(workspace, blobs, "out/secret", "out/**", "loop/x", "chain0/x")

    assert collected.entries == ()
    assert collected.missing == ("out/secret", "loop/x", "chain0/x")


@both_ways
@pytest.mark.threat("D05")
@pytest.mark.parametrize("rounds", [200])
def test_a_file_swapped_for_a_link_while_it_is_collected_brings_no_foreign_byte(
    workspace, blobs, tmp_path, rounds
):
    foreign = write(tmp_path / "shadow", b"root:foreign")
    (workspace / "out").mkdir()
    own, link, target = workspace / "own", workspace / "link", workspace / "out" / "f"
    stop = threading.Event()

    def swap():
        while not stop.is_set():
            own.write_bytes(b"mine")
            own.rename(target)
            link.symlink_to(foreign)
            link.rename(target)

    swapper = threading.Thread(target=swap)
    swapper.start()
    seen = set()
    try:
        for _ in range(rounds):
            collected = gather(workspace, blobs, "out/f")
            seen |= {(entry.type, entry.sha256) for entry in collected.entries}
    finally:
        stop.set()
        swapper.join(10)

    assert seen <= {("file", hashlib.sha256(content).hexdigest()) for content in (b"mine", b"")}
    assert blobs.path(hashlib.sha256(b"root:foreign").hexdigest()) is None


@both_ways
@pytest.mark.threat("D05")
@pytest.mark.parametrize("way", ["absolute", "relative"])
def test_a_folder_swapped_for_a_link_between_looking_and_reading_is_left_out(workspace, blobs, tmp_path, way):
    write(tmp_path / "outside/f", b"foreign")
    write(workspace / "out/f", b"mine")
    write(workspace / "a", b"first")

    def store(fd, *, max_bytes):
        if (workspace / "out").is_dir() and not (workspace / "out").is_symlink():
            (workspace / "out").rename(workspace / "moved")
            (workspace / "out").symlink_to(tmp_path / "outside" if way == "absolute" else "../outside")
        return blobs.put_fd(fd, max_bytes=max_bytes)

    collected = collect(workspace, ["a", "out/f"], max_bytes=GIB, store=store)

    assert paths(collected) == ["a"]
    assert collected.missing == ("out/f",)
    assert blobs.path(hashlib.sha256(b"foreign").hexdigest()) is None


@both_ways
@pytest.mark.threat("D06")
def test_hard_links_are_collected_as_bytes(workspace, blobs):
    write(workspace / "out/a", b"shared")
    os.link(workspace / "out/a", workspace / "out/b")

    collected = gather(workspace, blobs, "out")

    assert [(e.path, e.type, e.size) for e in collected.entries] == [
        ("out/a", "file", 6),
        ("out/b", "file", 6),
    ]


@both_ways
@pytest.mark.threat("D06")
@pytest.mark.skipif(not IS_ROOT, reason="mounts")
def test_what_is_mounted_into_the_workspace_is_left_out(workspace, blobs):
    write(workspace / "out/own")
    (workspace / "out/mounted").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", workspace / "out/mounted"], check=True)
    try:
        write(workspace / "out/mounted/foreign")
        collected = gather(workspace, blobs, "out", "out/mounted")
    finally:
        subprocess.run(["umount", workspace / "out/mounted"], check=True)

    assert paths(collected) == ["out/own"]
    assert collected.missing == ("out/mounted",)
    assert collected.warnings == ("out/mounted lies on another file system and is left out",)


@both_ways
@pytest.mark.skipif(not IS_ROOT, reason="mounts")
def test_the_merged_view_of_layers_is_collected(workspace, blobs, tmp_path):
    lower, upper, work = (tmp_path / name for name in ("lower", "upper", "work"))
    for folder in (lower, upper, work):
        folder.mkdir()
    write(lower / "out/below", b"below")
    write(lower / "out/gone")
    write(upper / "out/above", b"above")
    options = f"lowerdir={lower},upperdir={upper},workdir={work}"
    mount = ["mount", "-t", "overlay", "-o", options, "overlay", str(workspace)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("overlay cannot be mounted here")
    try:
        (workspace / "out/gone").unlink()
        collected = gather(workspace, blobs, "out")
    finally:
        subprocess.run(["umount", workspace], check=True)

    assert paths(collected) == ["out/above", "out/below"]
    assert collected.warnings == ()


@both_ways
@pytest.mark.threat("D07")
def test_what_is_no_file_is_skipped_without_waiting_for_it(workspace, blobs):
    out = workspace / "out"
    write(out / "file")
    os.mkfifo(out / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(out)  # the name of a socket must be short
        listener.bind("socket")
        os.chdir(here)
    if IS_ROOT:
        os.mknod(out / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (out / "mem").symlink_to("/proc/self/mem")

    began = time.monotonic()
    collected = gather(workspace, blobs, "out", "out/fifo")

    assert time.monotonic() - began < 10
    assert paths(collected) == ["out/file"]
    assert collected.missing == ("out/fifo",)
    assert len(collected.warnings) == (4 if IS_ROOT else 3)


@both_ways
@pytest.mark.threat("D07")
def test_a_pipe_put_in_place_of_a_file_does_not_block(workspace, blobs):
    write(workspace / "a")
    write(workspace / "b")

    def store(fd, *, max_bytes):
        (workspace / "b").unlink()
        os.mkfifo(workspace / "b")
        return blobs.put_fd(fd, max_bytes=max_bytes)

    collected = collect(workspace, ["a", "b"], max_bytes=GIB, store=store)

    assert paths(collected) == ["a"]
    assert collected.missing == ("b",)


@pytest.mark.threat("D08")
def test_a_huge_sparse_file_is_refused_before_it_is_read(workspace, blobs):
    (workspace / "out").mkdir()
    with (workspace / "out/sparse").open("wb") as file:
        file.truncate(10 * 1000**4)

    began = time.monotonic()
    with pytest.raises(StepError, match="exceed the limit") as caught:
        gather(workspace, blobs, "out")

    assert time.monotonic() - began < 10
    assert caught.value.reason is Reason.DISK_LIMIT


@pytest.mark.threat("D08")
def test_sizes_are_added_up(workspace, blobs):
    for name in "abc":
        write(workspace / name, b"12345")

    assert gather(workspace, blobs, "*", max_bytes=15).total_bytes == 15
    with pytest.raises(StepError):
        gather(workspace, blobs, "*", max_bytes=14)


@pytest.mark.threat("D09")
def test_too_many_files_are_refused(workspace, blobs):
    for n in range(21):
        write(workspace / "out" / str(n))

    assert len(gather(workspace, blobs, "out", max_files=21).entries) == 21
    with pytest.raises(StepError, match="more than 20 files") as caught:
        gather(workspace, blobs, "out", max_files=20)
    assert caught.value.reason is Reason.DISK_LIMIT


@pytest.mark.threat("D09")
def test_a_million_names_need_little_memory(monkeypatch, workspace, blobs):
    (workspace / "out").mkdir()
    real = os.scandir
    many = 1_000_000

    class Endless:
        """A folder of a million files, without a million files."""

        def __init__(self, fd):
            self.inner = real(fd)

        def __enter__(self):
            first = next(self.inner)
            return (first for _ in range(many))

        def __exit__(self, *_):
            self.inner.close()

    write(workspace / "out/f")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    inode = (workspace / "out").stat().st_ino
    monkeypatch.setattr(
        artifacts.os, "scandir", lambda fd: Endless(fd) if os.fstat(fd).st_ino == inode else real(fd)
    )

    with pytest.raises(StepError, match="more than 20000 files"):
        gather(workspace, blobs, "out")

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


@pytest.mark.threat("D09")
def test_names_that_are_no_showable_text_are_skipped_and_told_in_one_line(workspace, blobs):
    out = os.fsencode(workspace / "out")
    os.mkdir(out)
    for name in (b"new\nline", b"\xff\xfe", b"esc\x1b[31m", "turn\u202e".encode(), b"x" * 255, b'quo"te'):
        with open(os.path.join(out, name), "wb"):
            pass
    os.mkdir(os.path.join(out, b"bad\xfffolder"))
    with open(os.path.join(out, b"bad\xfffolder", b"inside"), "wb"):
        pass

    collected = gather(workspace, blobs, "out")

    assert paths(collected) == ['out/quo"te', "out/" + "x" * 255]
    assert sorted(warning.split(" has a name")[0] for warning in collected.warnings) == [
        "out/\\xff\\xfe",
        "out/bad\\xfffolder",
        "out/esc\\x1b[31m",
        "out/new\\nline",
        "out/turn\\u202e",
    ]


@pytest.mark.threat("D09")
def test_folders_beyond_the_depth_limit_are_left_out(workspace, blobs):
    deep = workspace / "/".join(["d"] * 199)
    write(deep / "f")
    write(deep / "d/d/f")

    collected = gather(workspace, blobs, "d")

    assert paths(collected) == ["d/" * 199 + "d", "d/" * 199 + "f"]  # the former as an empty folder
    assert len(collected.warnings) == 1
    assert "more than 200 folders deep" in collected.warnings[0]


@pytest.mark.threat("D09")
def test_warnings_are_bounded(workspace, blobs):
    (workspace / "out").mkdir()
    for n in range(60):
        (workspace / "out" / str(n)).symlink_to("/etc")

    collected = gather(workspace, blobs, "out")

    assert len(collected.warnings) == 51
    assert collected.warnings[-1] == "10 more warnings about outputs"


@pytest.mark.threat("D10")
def test_a_file_that_grew_after_the_look_is_held_to_the_limit(workspace, blobs):
    write(workspace / "a", b"1")
    write(workspace / "b", b"1")

    def store(fd, *, max_bytes):
        (workspace / "b").write_bytes(b"1" * 100)
        return blobs.put_fd(fd, max_bytes=max_bytes)

    with pytest.raises(StepError) as caught:
        collect(workspace, ["a", "b"], max_bytes=50, store=store)
    assert caught.value.reason is Reason.DISK_LIMIT


@pytest.mark.threat("D10")
def test_a_file_that_vanished_after_the_look_is_missing(workspace, blobs):
    write(workspace / "a")
    write(workspace / "b")

    def store(fd, *, max_bytes):
        (workspace / "b").unlink()
        return blobs.put_fd(fd, max_bytes=max_bytes)

    collected = collect(workspace, ["a", "b"], max_bytes=50, store=store)

    assert (paths(collected), collected.missing) == (["a"], ("b",))


@pytest.mark.threat("D11")
def test_special_bits_and_attributes_are_dropped(workspace, blobs):
    write(workspace / "out/suid").chmod(0o6755)
    write(workspace / "out/open").chmod(0o777)
    write(workspace / "out/closed").chmod(0o000)
    (workspace / "out/sticky").mkdir()
    (workspace / "out/sticky").chmod(0o1777)

    collected = gather(workspace, blobs, "out/**")

    modes = {entry.path: entry.mode for entry in collected.entries}
    assert modes["out/suid"] == 0o755
    assert modes["out/open"] == modes["out/sticky"] == 0o777
    if IS_ROOT:
        assert modes["out/closed"] == 0o000


@pytest.mark.threat("D22")
def test_a_disk_that_refuses_ends_the_step(workspace, blobs, monkeypatch):
    write(workspace / "out/f")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("runner.blobs.os.pwrite", refuse)
    with pytest.raises(StepError) as caught:
        gather(workspace, blobs, "out")

    assert caught.value.reason is Reason.DISK_FULL


@pytest.mark.threat("D12")
@pytest.mark.skipif(not IS_ROOT, reason="becomes somebody else")
def test_what_the_runner_may_not_read_is_left_out_and_missing():
    with tempfile.TemporaryDirectory() as folder:  # others may not enter the usual one
        workspace = Path(folder)
        workspace.chmod(0o755)
        write(workspace / "closed/f")
        write(workspace / "open/f").chmod(0o600)
        os.mkfifo(workspace / "fifo", 0o666)
        (workspace / "closed").chmod(0o000)

        missing, warnings = as_somebody_else(
            lambda: [*vars(gather(workspace, None, "closed", "open/f", "fifo")).values()][1:]
        )

    assert missing == ["closed", "open/f", "fifo"]
    assert warnings == [
        "fifo is no regular file and is left out",
        "closed cannot be read by the runner and is left out",
        "open/f cannot be read by the runner and is left out",
    ]


def as_somebody_else(act):
    """What `act` returns in a process without rights, as JSON tells it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        os.write(writer, json.dumps(act()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        answer = answers.read()
    os.waitpid(child, 0)
    return json.loads(answer)
