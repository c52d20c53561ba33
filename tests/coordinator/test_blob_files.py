"""The store of blobs on the disk: whoever writes a part is alone with it, and a stored blob never changes."""

import errno
import hashlib
import os
from pathlib import Path

import pytest

from coordinator.errors import Unavailable
from coordinator.store.blob_files import BlobFiles

DATA = b"the bytes of an output"
SHA = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def blobs(tmp_path: Path) -> BlobFiles:
    return BlobFiles(tmp_path)


def test_a_part_has_one_writer_at_a_time(blobs: BlobFiles) -> None:
    first = blobs.part("a-step", 1, SHA)
    first.write(DATA[:5])

    with pytest.raises(Unavailable):
        blobs.part("a-step", 1, SHA)
    first.release()

    second = blobs.part("a-step", 1, SHA)
    assert second.received == 5
    second.release()


def test_nobody_can_write_to_a_blob_that_is_stored(blobs: BlobFiles) -> None:
    first = blobs.part("a-step", 1, SHA)
    first.write(DATA)
    first.commit(SHA)

    late = blobs.part("a-step", 1, SHA)
    late.write(b"more")
    late.release()

    assert blobs.path(SHA).read_bytes() == DATA


def test_who_opened_a_part_before_it_was_stored_gets_a_new_one(
    blobs: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a request that has opened the part and is about to lock it
    first = blobs.part("a-step", 1, SHA)
    first.write(DATA)
    really_open = os.open
    opened: list[int] = []

    def open_and_lose_the_race(path: Path, *more: int) -> int:
        descriptor = really_open(path, *more)
        if not opened:
            opened.append(descriptor)
            first.commit(SHA)
        return descriptor

    # when the part is stored in between
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_and_lose_the_race)
        late = blobs.part("a-step", 1, SHA)
    late.write(b"more")
    late.release()

    # then what comes late goes elsewhere
    assert (opened != [], late.received) == (True, 4)
    assert blobs.path(SHA).read_bytes() == DATA


def test_bytes_that_are_being_written_are_not_swept(blobs: BlobFiles) -> None:
    incoming = blobs.part("a-step", 1, SHA)
    incoming.write(DATA)

    assert blobs.sweep(older_than_s=-60, now_s=2e9 + 2e9) == 0
    incoming.commit(SHA)
    blobs.part("a-step", 2, SHA).release()

    assert blobs.sweep(older_than_s=-60, now_s=2e9 + 2e9) == 1
    assert blobs.has(SHA, len(DATA))


def test_bytes_that_did_not_reach_the_disk_are_sent_anew(
    blobs: BlobFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    first = blobs.part("a-step", 1, SHA)
    first.write(DATA)
    with monkeypatch.context() as patch, pytest.raises(Unavailable):
        patch.setattr(os, "fsync", fail)
        first.commit(SHA)
    first.release()

    again = blobs.part("a-step", 1, SHA)
    assert again.received == 0
    again.release()
