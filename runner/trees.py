"""Merges, copies and measures whole folders without ever following a link.

A folder of an overlay may say that something below it is gone: a character device 0:0 (or a marked
empty file) hides one name, the mark "opaque" on a folder hides everything below it. `merge_layers`
reads these marks, so that its result is what the mounted overlay shows.
"""

# Trees of 50,000 files are walked as strings; Path objects would double the time.
# ruff: noqa: PTH101, PTH102, PTH115, PTH116, PTH211

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

OPAQUE = "trusted.overlay.opaque"
REDIRECT = "trusted.overlay.redirect"
WHITEOUT = "trusted.overlay.whiteout"
FICLONE = 0x40049409
COPY_CHUNK = 64 * 1024 * 1024
# Setuid and setgid bits stop here: a copy lies on the host, where they would give somebody rights.
KEPT_MODE = 0o1777


class Redirected(Exception):
    """A folder was renamed over a lower layer; only the kernel's own view shows what it holds."""


@dataclass(frozen=True)
class TreeSize:
    """How much a folder holds."""

    entries: int
    bytes: int


def merge_layers(layers: Sequence[Path], into: Path, *, share: bool) -> TreeSize:
    """Write into the new folder `into` what a stack of layers (topmost first) shows.

    With `share`, files are hard links to those of the layers and must never be written again;
    without it they are copies of their own, which share their blocks where the disk can do so.
    """
    into.mkdir()
    may_redirect = len(layers) > 1
    entries = size = 0
    folders: list[tuple[str, os.stat_result]] = []
    waiting = [([os.fspath(layer) for layer in layers], os.fspath(into))]
    while waiting:
        sources, target = waiting.pop()
        if sources:
            folders.append((target, os.stat(sources[0], follow_symlinks=False)))
        for name, found, below in _merged_names(sources):
            entries += 1
            place = f"{target}/{name}"
            if stat.S_ISDIR(found.st_mode):
                if may_redirect and _mark(below[0], REDIRECT):
                    raise Redirected(below[0])
                os.mkdir(place)
                waiting.append((below, place))
            else:
                size += found.st_blocks * 512
                _put(below[0], found, place, share=share)
    for target, found in reversed(folders):
        _dress(target, found)
    return TreeSize(entries, size)


def measure(root: Path) -> TreeSize:
    """How many entries a folder has and how much of the disk they take."""
    entries = size = 0
    for _, found in walk(root):
        entries += 1
        size += found.st_blocks * 512
    return TreeSize(entries, size)


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below `root`, folders before what they hold, links as links."""
    waiting = [os.fspath(root)]
    while waiting:
        with os.scandir(waiting.pop()) as listing:
            for entry in listing:
                found = entry.stat(follow_symlinks=False)
                yield entry.path, found
                if stat.S_ISDIR(found.st_mode):
                    waiting.append(entry.path)


def copy_file(source: str, target: str, *, mode: int) -> None:
    """Copy one regular file to a new place, sharing blocks where possible and keeping its holes."""
    reader = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            if not _reflink(reader, writer):
                _copy_data(reader, writer)
            os.fchmod(writer, mode)
        finally:
            os.close(writer)
    finally:
        os.close(reader)


def _merged_names(sources: list[str]) -> Iterator[tuple[str, os.stat_result, list[str]]]:
    """Each name that shows in a merged folder, with the places that make it up, topmost first."""
    shown: dict[str, tuple[os.stat_result, list[str]]] = {}
    closed: set[str] = set()
    for source in sources:
        may_be_marked = _mark(source, OPAQUE) == b"x"
        with os.scandir(source) as listing:
            for entry in listing:
                name = entry.name
                if name in closed:
                    continue
                found = entry.stat(follow_symlinks=False)
                if _is_whiteout(entry.path, found, may_be_marked=may_be_marked):
                    closed.add(name)
                elif not stat.S_ISDIR(found.st_mode):
                    shown.setdefault(name, (found, [entry.path]))
                    closed.add(name)
                else:
                    shown.setdefault(name, (found, []))[1].append(entry.path)
                    if len(sources) > 1 and _mark(entry.path, OPAQUE) == b"y":
                        closed.add(name)
    for name, (found, places) in shown.items():
        yield name, found, places


def _is_whiteout(path: str, found: os.stat_result, *, may_be_marked: bool) -> bool:
    if stat.S_ISCHR(found.st_mode):
        return found.st_rdev == 0
    if may_be_marked and stat.S_ISREG(found.st_mode) and found.st_size == 0:
        return _mark(path, WHITEOUT) is not None
    return False


def _mark(path: str, name: str) -> bytes | None:
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP, errno.EPERM):
            return None
        raise


def _put(source: str, found: os.stat_result, target: str, *, share: bool) -> None:
    if share and _link(source, target):
        return
    if stat.S_ISLNK(found.st_mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISREG(found.st_mode):
        copy_file(source, target, mode=found.st_mode & KEPT_MODE)
    elif stat.S_ISFIFO(found.st_mode):
        os.mkfifo(target)
    else:
        return  # sockets and devices mean nothing in another place
    _dress(target, found)


def _link(source: str, target: str) -> bool:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EMLINK, errno.EXDEV, errno.EPERM):
            return False
        raise
    return True


def _dress(target: str, found: os.stat_result) -> None:
    """Give owner, mode and times of the original; the owner only where we may."""
    if os.geteuid() == 0:
        os.chown(target, found.st_uid, found.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(found.st_mode):
        os.chmod(target, found.st_mode & KEPT_MODE)  # after chown, which drops bits
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns), follow_symlinks=False)


def _reflink(reader: int, writer: int) -> bool:
    try:
        fcntl.ioctl(writer, FICLONE, reader)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
            return False
        raise
    return True


def _copy_data(reader: int, writer: int) -> None:
    """Copy the parts that hold data; a hole of a terabyte stays a hole."""
    size = os.fstat(reader).st_size
    os.ftruncate(writer, size)
    start = 0
    while start < size:
        try:
            start = os.lseek(reader, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(reader, start, os.SEEK_HOLE)
        os.lseek(reader, start, os.SEEK_SET)
        os.lseek(writer, start, os.SEEK_SET)
        while start < end:
            count = os.sendfile(writer, reader, None, min(end - start, COPY_CHUNK))
            if count == 0:
                return  # the file became shorter under us
            start += count
