"""Watches the room on the disk: how much is free, and how much of it a running step takes.

A step is ended when it takes more than its limit, or when it has grown while the disk runs short.
"""

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 1024**2
LOOK_S = 2.0
# Looking is never more than this part of a processor's time.
LOOK_SHARE = 0.05
MOST_ENTRIES = 200_000
# Who wrote less than this is not the one that fills the disk.
INNOCENT_BYTES = 64 * MIB
# What a step can do to its folders while they are looked at.
COME_AND_GO = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENAMETOOLONG, errno.ESTALE}
)


@dataclass(frozen=True)
class DiskGuard:
    """What may be taken of the state folder's file system; 0 and None mean no limit."""

    state: Path
    reserve_bytes: int = 0
    step_bytes: int | None = None

    @property
    def is_short(self) -> bool:
        """True when less is free than has to stay free."""
        return self.reserve_bytes > 0 and free_bytes(self.state) < self.reserve_bytes

    def verdict(self, attempt_dir: Path) -> str:
        """Why the step of this attempt has to end; nothing when it may go on."""
        is_short = self.is_short
        if self.step_bytes is None and not is_short:
            return ""
        taken = bytes_taken(attempt_dir)
        if self.step_bytes is not None and taken > self.step_bytes:
            return f"the step takes {taken // MIB} MiB of the disk; its limit is {self.step_bytes // MIB} MiB"
        if is_short and taken > INNOCENT_BYTES:
            return (
                f"less than {self.reserve_bytes // MIB} MiB are free on the runner's disk, "
                f"and the step takes {taken // MIB} MiB"
            )
        return ""


class DiskWatch:
    """The guard's eye on one running step: looks now and then, the rarer the longer a look takes."""

    def __init__(
        self, guard: DiskGuard, attempt_dir: Path, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._guard = guard
        self._attempt_dir = attempt_dir
        self._clock = clock
        self._next = clock()

    def verdict(self) -> str:
        """Why the step has to end, when it is time to look again."""
        began = self._clock()
        if began < self._next:
            return ""
        said = self._guard.verdict(self._attempt_dir)
        ended = self._clock()
        self._next = ended + max(LOOK_S, (ended - began) / LOOK_SHARE)
        return said


def free_bytes(folder: Path) -> int:
    """What is left for us on the file system of `folder`."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def bytes_taken(root: Path, *, most_entries: int = MOST_ENTRIES) -> int:
    """What the files below `root` take of its own disk; a lower bound where there are too many of them.

    Neither links nor mounts are followed: a workspace that is an overlay counts by what was written into it.
    A file with several names counts once for each.
    """
    try:
        device = root.lstat().st_dev
    except FileNotFoundError:
        return 0
    total = seen = 0
    waiting = [os.fspath(root)]
    while waiting and seen < most_entries:
        sizes, folders = _look_into(waiting.pop(), device, most_entries - seen)
        seen += len(sizes)
        total += sum(sizes)
        waiting += folders
    return total


def _look_into(path: str, device: int, at_most: int) -> tuple[list[int], list[str]]:
    """The bytes of each entry of one folder, and the folders among them; a running step may change it."""
    sizes: list[int] = []
    folders: list[str] = []
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in COME_AND_GO:
            return sizes, folders
        raise
    try:
        if os.fstat(folder).st_dev != device:
            return sizes, folders
        with os.scandir(folder) as listing:
            for entry in listing:
                if len(sizes) >= at_most:
                    break
                try:
                    found = entry.stat(follow_symlinks=False)
                except OSError as error:
                    if error.errno in COME_AND_GO:
                        continue
                    raise
                if found.st_dev != device:
                    continue
                sizes.append(found.st_blocks * 512)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{path}/{entry.name}")
    finally:
        os.close(folder)
    return sizes, folders
