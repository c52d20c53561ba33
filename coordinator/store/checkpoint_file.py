"""How far the chains of the audit trail had come, in a file that only grows, beside the database.

Each line is sealed with a key, and with the line before it: none can be changed, or taken out of the middle.
"""

import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from coordinator.rules.audit_chain import (
    BadCheckpoint,
    Checkpoint,
    Link,
    read_checkpoint,
    seal_in,
    spell_checkpoint,
)

LONGEST_LINE = 1024
_LAST_LINES = 64 * 1024
_LATELY = 1024 * 1024


class CheckpointsBusy(OSError):
    """Another process is writing checkpoints at this moment."""


class CheckpointFile:
    """The file of one data folder; several processes may write to it."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._path = path
        self._key = key

    def append(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Add a line for each, on the disk before this returns; or an OSError, and the file is as before."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        is_new = not self._path.exists()
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            _hold(descriptor)
            size, before = _whole_lines(descriptor)
            lines = []
            for checkpoint in checkpoints:
                line, before = spell_checkpoint(self._key, before, checkpoint)
                lines.append(line + "\n")
            _write(descriptor, "".join(lines).encode(), size)
        finally:
            os.close(descriptor)
        if is_new:
            _sync_folder(self._path.parent)

    def find_lately(self) -> dict[str, Link]:
        """The last checkpoint of each chain, as far as the end of the file has them."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return {}
        try:
            start = max(0, os.fstat(descriptor).st_size - _LATELY)
            lines = os.pread(descriptor, _LATELY, start).decode("utf-8", "replace").split("\n")[:-1]
        finally:
            os.close(descriptor)
        found = {}
        for before, line in zip(["", *lines], lines, strict=False):
            try:
                checkpoint, _ = read_checkpoint(self._key, seal_in(before), line)
            except BadCheckpoint:
                continue  # the first of these lines may be cut; `buildmill audit verify` tells of all others
            found[checkpoint.chain] = Link(checkpoint.seq, checkpoint.hash)
        return found


def read_lines(path: Path) -> Iterator[str]:
    """The lines that are complete now; what has no end was never finished."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0 and (line := file.readline(min(left, LONGEST_LINE))):
            left -= len(line)
            if line.endswith(b"\n") or left > 0:
                yield line.decode("utf-8", "replace").rstrip("\n")


def _hold(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointsBusy("another process writes checkpoints") from error


def _whole_lines(descriptor: int) -> tuple[int, str]:
    """How long the file is without a line that was never finished, and the seal of its last line."""
    size = os.fstat(descriptor).st_size
    start = max(0, size - _LAST_LINES)
    tail = os.pread(descriptor, _LAST_LINES, start)
    whole, newline, _torn = tail.rpartition(b"\n")
    if not newline:
        return start, ""
    return start + len(whole) + 1, seal_in(whole.rpartition(b"\n")[2].decode("utf-8", "replace"))


def _write(descriptor: int, data: bytes, size: int) -> None:
    """Behind the first `size` bytes; what a process that was killed has left there goes first."""
    os.ftruncate(descriptor, size)
    try:
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
