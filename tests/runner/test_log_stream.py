"""The log comes out masked, whole, and the same each time it is asked for."""

import hashlib
import json
import os
import random
import resource
import threading
import time

import pytest

from runner.inotify import Inotify
from runner.log_stream import (
    CHECKPOINT_BYTES,
    DISCARD_BYTES,
    MOST_CHECKPOINTS,
    Chunk,
    LogStream,
    gap_line,
)
from runner.mask import Masker

SECRET = b"hunter2-hunter2"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def opened(path, tmp_path):
    """Opens streams on the log and closes them all in the end."""
    streams = []

    def open_stream(*needles, identity=None):
        stream = LogStream(
            path, Masker(needles), identity=identity, checkpoints=tmp_path / "checkpoints.json"
        )
        streams.append(stream)
        return stream

    yield open_stream
    for stream in streams:
        stream.close()


def append(path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def drain(stream, max_bytes=1024 * 1024) -> bytes:
    parts = []
    expected = stream.size
    while chunk := stream.read(max_bytes):
        assert chunk.offset == expected
        assert 0 < len(chunk.data) <= max_bytes
        expected += len(chunk.data)
        parts.append(chunk.data)
    return b"".join(parts)


def noise(seed: int, size: int) -> bytes:
    """Bytes of all kinds with secrets, and beginnings of secrets, in between."""
    chance = random.Random(seed)
    parts = []
    length = 0
    while length < size:
        part = chance.randbytes(chance.randint(0, 3000))
        part += chance.choice(
            [SECRET, SECRET[: chance.randint(1, 14)], b"\n", b"\0\xff\r\n", SECRET + SECRET]
        )
        parts.append(part)
        length += len(part)
    return b"".join(parts)


def masked(content: bytes) -> bytes:
    masker = Masker([SECRET])
    return masker.feed(content) + masker.finish()


def test_chunks_carry_their_offsets_and_the_total_its_digest(path, opened):
    stream = opened(SECRET)
    append(path, b"one " + SECRET + b"\n")

    first = stream.read()
    append(path, b"two, no newline")
    rest = stream.read()
    stream.finish()

    assert (first, rest) == (Chunk(0, b"one ***\n"), Chunk(8, b"two, no newline"))
    assert stream.read() is None
    assert stream.is_at_end
    assert stream.total().size == stream.size == 23
    assert stream.total().sha256 == hashlib.sha256(b"one ***\ntwo, no newline").hexdigest()


@pytest.mark.threat("G01")
def test_a_secret_written_byte_by_byte_never_shows(path, opened):
    stream = opened(SECRET)
    shown = b""

    for byte in b"<" + SECRET + b">":
        append(path, bytes([byte]))
        shown += drain(stream)

    stream.finish()
    assert shown + drain(stream) == b"<***>"


def test_the_end_of_a_secret_is_waited_for_until_the_writer_is_dead(path, opened):
    stream = opened(SECRET)
    append(path, b"x" + SECRET[:6])

    early = drain(stream)
    waiting = (stream.read(), stream.is_at_end)
    stream.finish()

    assert early == b"x"
    assert waiting == (None, False)
    assert drain(stream) == SECRET[:6]
    assert stream.is_at_end


@pytest.mark.parametrize("needles", [(), (SECRET,)])
def test_any_bytes_come_through_in_any_pieces(path, opened, needles):
    content = noise(1, 700_000)
    append(path, content)
    stream = opened(*needles)
    stream.finish()

    answer = drain(stream, max_bytes=50_001)

    assert answer == (masked(content) if needles else content)


@pytest.mark.threat("G01")
def test_the_stream_can_begin_anew_anywhere_and_repeats_itself(path, opened):
    content = noise(2, 2_500_000)
    append(path, content)
    whole = masked(content)
    stream = opened(SECRET)
    stream.finish()
    assert drain(stream) == whole
    chance = random.Random(5)

    for offset in [0, len(whole), *(chance.randrange(len(whole)) for _ in range(12))]:
        stream.rewind(offset)
        assert stream.size == offset
        chunk = stream.read(70_000)
        if offset < len(whole):
            assert chunk == Chunk(offset, whole[offset : offset + len(chunk.data)])

    begin = stream.size
    assert drain(stream) == whole[begin:]
    assert stream.total().sha256 == hashlib.sha256(whole).hexdigest()
    assert not stream.is_lost


def test_a_later_life_goes_on_byte_for_byte(path, opened):
    content = noise(3, 2_000_000)
    append(path, content[:1_200_000])
    whole = masked(content)
    first = opened(SECRET)
    sent = drain(first)
    append(path, content[1_200_000:])

    for held_by_coordinator in (0, 300_000, len(sent) - 1, len(sent)):
        second = opened(SECRET, identity=first.identity)
        second.rewind(held_by_coordinator)
        assert drain(second) == whole[held_by_coordinator : second.size]
        second.finish()
        drain(second)
        assert second.total().size == len(whole)
        assert second.total().sha256 == hashlib.sha256(whole).hexdigest()
        assert not second.is_lost


def test_checkpoints_spare_reading_from_the_start(path, opened, tmp_path):
    append(path, b"line\n" * 1_000_000)
    first = opened(SECRET)
    size = len(drain(first))
    saved = json.loads((tmp_path / "checkpoints.json").read_bytes())["checkpoints"]

    second = opened(SECRET, identity=first.identity)
    with path.open("r+b") as file:  # if this were read again it would show
        file.write(b"XXXX\n" * 900_000)
    second.rewind(size - 100)

    assert len(saved) >= 10
    assert drain(second) == b"line\n" * 20


@pytest.mark.threat("G01")
def test_a_secret_across_the_place_of_a_checkpoint_stays_masked_for_a_later_life(path, opened):
    for shift in range(len(SECRET) + 1):
        path.write_bytes(b"x" * (CHECKPOINT_BYTES - shift) + SECRET + SECRET + b"behind")
        first = opened(SECRET)
        size = len(drain(first))

        second = opened(SECRET, identity=first.identity)
        second.rewind(size - 6)

        assert size == CHECKPOINT_BYTES - shift + len(b"***behind")
        assert drain(second) == b"behind"
        (path.parent / "checkpoints.json").unlink(missing_ok=True)


def test_a_crash_after_the_held_back_end_was_sent_loses_nothing(path, opened):
    append(path, b"x" + SECRET[:6])
    first = opened(SECRET)
    first.finish()
    assert drain(first) == b"x" + SECRET[:6]

    second = opened(SECRET, identity=first.identity)
    second.rewind(7)
    second.finish()

    assert drain(second) == b""
    assert second.total() == first.total()
    assert not second.is_lost


def test_checkpoints_are_bounded(path, opened, tmp_path):
    stream = opened(SECRET)
    for _ in range(MOST_CHECKPOINTS + 8):
        append(path, b"0123456789abcde\n" * (CHECKPOINT_BYTES // 16))
        drain(stream)

    saved = json.loads((tmp_path / "checkpoints.json").read_bytes())["checkpoints"]

    assert MOST_CHECKPOINTS // 2 <= len(saved) <= MOST_CHECKPOINTS
    assert saved[-1][0] >= MOST_CHECKPOINTS * CHECKPOINT_BYTES


@pytest.mark.parametrize("content", [b"", b"{", b'{"start": 1}', b"[]", b"\xff", b'{"start":[0]}'])
def test_unreadable_checkpoints_only_cost_time(path, opened, tmp_path, content):
    append(path, b"hello\n")
    (tmp_path / "checkpoints.json").write_bytes(content)

    stream = opened()

    assert drain(stream) == b"hello\n"


def test_a_line_of_100_megabytes_needs_little_memory(path, opened):
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stream = opened(SECRET)
    stream.finish()
    digest = hashlib.sha256()

    while chunk := stream.read():
        digest.update(chunk.data)

    assert stream.total().size == 100_000_000
    assert stream.total().sha256 == digest.hexdigest()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_a_log_that_was_cut_says_where_and_goes_on_with_what_comes_after(path, opened):
    stream = opened(SECRET)
    append(path, b"before the cut\n")
    before = drain(stream)

    path.open("wb").close()
    append(path, b"behind\n")
    behind = drain(stream)
    stream.finish()

    assert before == b"before the cut\n"
    assert behind == gap_line(15, 0) + b"behind\n"
    assert drain(stream) == b""
    assert (stream.total().size, stream.total().sha256) == (len(before + behind), None)


def test_what_was_seen_and_not_read_before_a_cut_is_counted(path, opened):
    stream = opened()
    append(path, b"read")
    assert stream.read() == Chunk(0, b"read")
    append(path, b"never read\n")
    assert stream.wait(5)

    path.open("wb").close()
    append(path, b"behind\n")

    assert drain(stream) == b"\n" + gap_line(4, 11) + b"behind\n"


def test_a_log_that_was_cut_and_has_grown_again_is_seen_to_be_another(path, opened):
    stream = opened()
    append(path, b"one\ntwo\n")
    drain(stream)

    path.open("wb").close()
    append(path, b"all of this was written after the cut\n")

    assert drain(stream) == gap_line(8, 0) + b"all of this was written after the cut\n"


def test_a_log_that_was_cut_when_nobody_writes_any_more_ends_with_the_gap(path, opened):
    stream = opened()
    append(path, b"0123456789")
    assert stream.read(4) == Chunk(0, b"0123")
    stream.finish()

    path.open("wb").close()
    rest = drain(stream)

    assert rest == b"\n" + gap_line(4, 6)
    assert stream.is_at_end


def test_after_a_cut_the_log_of_the_coordinator_stays_without_a_hole(path, opened):
    stream = opened(SECRET)
    append(path, b"0123456789")
    drain(stream)
    path.open("wb").close()
    drain(stream)

    stream.rewind(4)  # the coordinator got no more of it

    assert stream.read() == Chunk(4, b"\n" + gap_line(4, 6))
    assert stream.is_lost


def test_a_gap_can_be_sent_again_from_any_place_in_this_life_and_the_next(path, opened):
    first = opened(SECRET)
    append(path, b"before\n")
    drain(first)
    path.open("wb").close()
    append(path, b"behind\n")
    whole = b"before\n" + drain(first)

    for stream in (first, opened(SECRET)):
        for offset in range(7, len(whole)):
            stream.rewind(offset)
            assert drain(stream) == whole[offset:]
        assert stream.is_lost


def test_a_log_cut_between_two_lives_is_noted(path, opened):
    append(path, noise(4, 600_000))
    first = opened(SECRET)
    sent = len(drain(first))
    path.write_bytes(b"all new\n")

    second = opened(SECRET, identity=first.identity)
    second.rewind(sent)

    assert second.read() == Chunk(sent, b"\n" + gap_line(sent, 0) + b"all new\n")
    third = opened(SECRET, identity=first.identity)
    third.rewind(sent)
    assert third.is_lost
    assert third.read() == Chunk(sent, b"\n" + gap_line(sent, 0) + b"all new\n")


@pytest.mark.threat("D04")
@pytest.mark.parametrize("what", ["gone", "link", "other file", "pipe", "folder"])
def test_a_log_that_is_not_the_one_it_was_is_not_read(path, opened, tmp_path, what):
    identity = opened().identity
    path.rename(tmp_path / "old")
    if what == "link":
        path.symlink_to("/etc/passwd")
    elif what == "other file":
        path.write_bytes(b"foreign")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()

    stream = opened(identity=identity)
    stream.rewind(1000)
    stream.note("the runner was restarted")
    stream.finish()

    answer = b"[buildmill] the runner was restarted\n"
    assert stream.read() == Chunk(1000, b"\n" + gap_line(1000, 0) + answer)
    assert stream.total().sha256 is None


@pytest.mark.threat("D04")
def test_a_log_that_is_a_link_is_never_followed(path, opened):
    path.unlink()
    path.symlink_to("/etc/passwd")

    stream = opened()

    assert stream.read().data == gap_line(0, 0)


def test_notes_are_single_lines_on_a_line_of_their_own(path, opened):
    stream = opened(SECRET)
    stream.note("pulling")
    append(path, b"no newline")

    stream.note("two\nlines \x1b[31m " + SECRET.decode(), "WARN")
    stream.note("z" * 5000, "ERROR")

    lines = drain(stream).split(b"\n")
    assert lines[:3] == [
        b"[buildmill] pulling",
        b"no newline",
        b"[buildmill] warning: two\\nlines \\x1b[31m ***",
    ]
    assert lines[3] == b"[buildmill] error: " + b"z" * 4096 + b"..."
    assert lines[4:] == [b""]


def test_nothing_can_be_noted_once_the_size_was_told(opened):
    stream = opened()
    stream.finish()

    with pytest.raises(ValueError, match="closed"):
        stream.note("too late")


def test_the_total_is_not_told_before_the_end(path, opened):
    stream = opened()
    append(path, b"x")
    stream.finish()

    with pytest.raises(ValueError, match="not been read"):
        stream.total()


def test_beyond_the_limit_the_file_is_given_back_again_and_again(path, opened):
    content = noise(6, 1_000_000)
    append(path, content)
    stream = opened(SECRET)
    drain(stream)
    stream.stop(500_000)
    kept = masked(content)[:500_000]

    for _ in range(3):
        append(path, bytes(DISCARD_BYTES + 1))
        assert stream.wait(0.01) is False
        assert path.stat().st_size == 0

    later = opened(SECRET, identity=stream.identity)
    for each in (stream, later):
        assert each.read() is None
        assert (each.total().size, each.total().sha256) == (500_000, hashlib.sha256(kept).hexdigest())


def test_waiting_ends_when_something_is_written(path, opened):
    stream = opened()
    writer = threading.Timer(0.1, append, (path, b"news\n"))
    writer.start()

    began = time.monotonic()
    has_news = stream.wait(10)

    assert has_news
    assert time.monotonic() - began < 0.9  # told by the kernel, not found by looking each second
    assert drain(stream) == b"news\n"
    writer.join(10)


def test_waiting_ends_when_nobody_writes_any_more(opened):
    stream = opened()
    last = threading.Timer(0.1, stream.finish)
    last.start()

    began = time.monotonic()
    stream.wait(10)

    assert time.monotonic() - began < 0.9
    assert drain(stream) == b""
    assert stream.is_at_end
    last.join(10)


def test_waiting_without_news_ends_in_time(path, opened):
    stream = opened(SECRET)
    append(path, SECRET[:4])
    drain(stream)

    began = time.monotonic()

    assert stream.wait(0.2) is False
    assert 0.2 <= time.monotonic() - began < 5


def test_without_the_kernels_word_waiting_still_finds_news(path, opened, monkeypatch):
    stream = opened()
    monkeypatch.setattr(stream, "_inotify", Inotify())
    writer = threading.Timer(0.1, append, (path, b"news\n"))
    writer.start()

    assert stream.wait(10)

    writer.join(10)


def test_a_writer_at_full_speed_is_followed_byte_for_byte(path, opened):
    content = noise(8, 3_000_000)
    stream = opened(SECRET)

    def write():
        with path.open("ab", buffering=0) as file:
            for start in range(0, len(content), 7919):
                file.write(content[start : start + 7919])

    writer = threading.Thread(target=write)
    writer.start()
    parts = []
    while writer.is_alive():
        stream.wait(0.05)
        parts.append(drain(stream))
    writer.join(10)
    stream.finish()
    parts.append(drain(stream))

    assert b"".join(parts) == masked(content)
    assert stream.total().sha256 == hashlib.sha256(masked(content)).hexdigest()
