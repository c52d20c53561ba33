"""Small files that are whole or absent: written aside, synced, renamed into place."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner.errors import StepError
from shared.reasons import Reason

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_whole(path: Path, content: bytes, *, mode: int = 0o600, durable: bool = True) -> None:
    """Replace `path` by `content`; a reader sees the old bytes or the new ones, never a mixture.

    With `durable` this also holds over a loss of power once the call has returned.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(part, flags, mode)
    try:
        os.fchmod(fd, mode)  # neither umask nor an older part decides who may read it
        write_all(fd, content)
        if durable:
            os.fsync(fd)
    finally:
        os.close(fd)
    part.rename(path)
    if durable:
        sync_folder(path.parent)


def write_all(fd: int, content: bytes | memoryview) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_folder(folder: Path) -> None:
    """Make the names in this folder survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def no_room_ends_the_step(consequence: str) -> Iterator[None]:
    """Say what the disk refused as the end of the step that wanted it."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StepError(Reason.DISK_FULL, f"the runner's disk is full: {consequence}") from error
        if error.errno == errno.EIO:
            raise StepError(Reason.INTERNAL, f"the runner's disk fails: {consequence}") from error
        raise
