"""Bytes by their digest: whole or absent, and unchanged for ever."""

import errno
import hashlib
import os
import stat
import subprocess
import threading
import time

import pytest

from runner.blobs import CHUNK_BYTES, LocalBlobs
from runner.errors import StepError, Unreachable
from shared.reasons import Reason


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def blobs(tmp_path):
    return LocalBlobs(tmp_path / "blobs", max_bytes=1 << 30)


def put(blobs, tmp_path, content: bytes) -> str:
    source = tmp_path / "source"
    source.write_bytes(content)
    with source.open("rb") as file:
        sha256, size = blobs.put_fd(file.fileno())
    assert (sha256, size) == (digest(content), len(content))
    return sha256


def parts_left(blobs) -> list:
    return list((blobs.root / "incoming").iterdir())


@pytest.mark.parametrize("content", [b"", b"x", b"ab" * CHUNK_BYTES, bytes(CHUNK_BYTES * 2) + b"tail"])
def test_what_is_put_can_be_read_by_its_digest(blobs, tmp_path, content):
    sha256 = put(blobs, tmp_path, content)

    path = blobs.path(sha256)

    assert path.read_bytes() == content
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    assert parts_left(blobs) == []


def test_a_blob_stays_when_its_source_changes(blobs, tmp_path):
    sha256 = put(blobs, tmp_path, b"before")

    (tmp_path / "source").write_bytes(b"after!")

    assert blobs.path(sha256).read_bytes() == b"before"


def test_the_same_bytes_are_kept_once(blobs, tmp_path):
    first = put(blobs, tmp_path, b"same")
    inode = blobs.path(first).stat().st_ino

    put(blobs, tmp_path, b"same")

    assert blobs.path(first).stat().st_ino == inode


@pytest.mark.threat("D10")
def test_a_file_that_grows_without_end_is_not_read_without_end(blobs, tmp_path):
    source = tmp_path / "grows"
    source.write_bytes(bytes(range(256)) * 1000)

    with source.open("rb") as file, pytest.raises(StepError) as caught:
        blobs.put_fd(file.fileno(), max_bytes=1000)

    assert caught.value.reason is Reason.DISK_LIMIT
    assert parts_left(blobs) == []


@pytest.mark.threat("D10")
def test_digest_and_size_are_those_of_the_kept_bytes_while_the_file_changes(blobs, tmp_path):
    source = tmp_path / "restless"
    source.write_bytes(bytes(8 * CHUNK_BYTES))
    stop = threading.Event()

    def change():
        with source.open("r+b") as file:
            while not stop.is_set():
                file.seek(0)
                file.write(os.urandom(CHUNK_BYTES))
                file.truncate(CHUNK_BYTES * (2 + os.urandom(1)[0] % 8))

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(10):
            with source.open("rb") as file:
                sha256, size = blobs.put_fd(file.fileno())
            kept = blobs.path(sha256).read_bytes()
            assert (digest(kept), len(kept)) == (sha256, size)
    finally:
        stop.set()
        changer.join(10)


def test_holes_stay_holes(blobs, tmp_path):
    source = tmp_path / "sparse"
    with source.open("wb") as file:
        file.truncate(64 * CHUNK_BYTES)

    with source.open("rb") as file:
        sha256, size = blobs.put_fd(file.fileno())

    kept = blobs.path(sha256).stat()
    assert size == kept.st_size == 64 * CHUNK_BYTES
    assert kept.st_blocks * 512 < CHUNK_BYTES


def test_what_arrives_as_announced_is_kept(blobs):
    content = b"from afar"

    with blobs.writer(digest(content), len(content)) as writer:
        writer.write(content[:4])
        assert blobs.path(digest(content)) is None
        writer.write(content[4:])

    assert blobs.path(digest(content)).read_bytes() == content


@pytest.mark.parametrize("arrived", [b"from afa", b"from afar!", b"from afaR", b""])
def test_what_arrives_otherwise_is_not_kept_and_may_be_asked_for_again(blobs, arrived):
    content = b"from afar"

    with pytest.raises(Unreachable), blobs.writer(digest(content), len(content)) as writer:
        writer.write(arrived)

    assert blobs.path(digest(content)) is None
    assert parts_left(blobs) == []


@pytest.mark.threat("D15")
def test_a_blob_cut_short_by_a_loss_of_power_is_not_trusted(blobs, tmp_path):
    sha256 = put(blobs, tmp_path, b"a whole blob")
    path = blobs.path(sha256)
    path.chmod(0o644)
    path.write_bytes(b"a who")

    next_life = LocalBlobs(blobs.root, max_bytes=1 << 30)

    assert next_life.path(sha256) is None
    assert put(next_life, tmp_path, b"a whole blob") == sha256
    assert next_life.path(sha256).read_bytes() == b"a whole blob"


def test_a_new_life_sweeps_what_the_former_did_not_finish(blobs):
    (blobs.root / "incoming" / "7").write_bytes(b"half")

    LocalBlobs(blobs.root, max_bytes=1)

    assert parts_left(blobs) == []


def test_the_longest_unused_blobs_leave_first_and_pinned_ones_stay(tmp_path):
    now = [0.0]
    blobs = LocalBlobs(tmp_path / "blobs", max_bytes=25, clock=lambda: now[0])
    names = [put(blobs, tmp_path, bytes([n]) * 10) for n in range(4)]
    for age, sha256 in enumerate(names):
        os.utime(blobs.path(sha256), (1000 + age, 1000 + age))

    now[0] += 601
    freed = blobs.evict({names[0]})

    assert freed == 20
    assert [blobs.path(name) is not None for name in names] == [True, False, False, True]


def test_what_was_just_used_is_not_evicted(tmp_path):
    now = [0.0]
    blobs = LocalBlobs(tmp_path / "blobs", max_bytes=0, clock=lambda: now[0])
    sha256 = put(blobs, tmp_path, b"in use")
    os.utime(blobs.path(sha256), (1000, 1000))
    place = blobs.path(sha256)

    now[0] += 599
    freed = blobs.evict()

    assert freed == 0
    assert place.stat().st_mtime == 1000  # other names of the file keep their age
    now[0] += 2
    assert blobs.evict() == 6


@pytest.mark.parametrize("jump_s", [3600, -3600])
def test_a_wall_clock_that_jumps_takes_nothing_from_a_gathering(tmp_path, monkeypatch, jump_s):
    now, wall_s = [0.0], time.time()
    blobs = LocalBlobs(tmp_path / "blobs", max_bytes=0, clock=lambda: now[0])

    with blobs.gathering():
        monkeypatch.setattr(time, "time_ns", lambda: int((wall_s + jump_s) * 1e9))
        sha256 = put(blobs, tmp_path, b"output")
        now[0] += 5000
        freed_meanwhile = blobs.evict()

    assert freed_meanwhile == 0
    assert blobs.path(sha256) is not None
    assert list(blobs.spares()) == []
    now[0] += 601
    assert [spare.name for spare in blobs.spares()] == [sha256]


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 63 + "\n"])
def test_only_digests_name_blobs(blobs, name):
    with pytest.raises(ValueError, match="not a digest"):
        blobs.path(name)


@pytest.mark.threat("D22")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_ends_the_step_and_leaves_no_part(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small], check=True)
    try:
        blobs = LocalBlobs(small / "blobs", max_bytes=1 << 30)
        source = tmp_path / "big"
        source.write_bytes(os.urandom(1 << 20))
        with source.open("rb") as file, pytest.raises(StepError) as caught:
            blobs.put_fd(file.fileno())
        assert caught.value.reason is Reason.DISK_FULL
        assert parts_left(blobs) == []
        assert put(blobs, tmp_path, b"there is room for this")
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.threat("D22")
@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, Reason.DISK_FULL), (errno.EDQUOT, Reason.DISK_FULL), (errno.EIO, Reason.INTERNAL)],
)
@pytest.mark.parametrize("call", ["open", "pwrite", "ftruncate"])
def test_each_refusal_of_the_disk_is_named(blobs, tmp_path, monkeypatch, number, reason, call):
    source = tmp_path / "source"
    content = b"content" * (1 if call != "ftruncate" else CHUNK_BYTES)
    source.write_bytes(content)
    with source.open("rb") as file:

        def refuse(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(f"runner.blobs.os.{call}", refuse)
        with pytest.raises(StepError) as caught:
            blobs.put_fd(file.fileno())
        monkeypatch.undo()

    assert caught.value.reason is reason
    assert parts_left(blobs) == []
    assert blobs.path(digest(content)) is None
