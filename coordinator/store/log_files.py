"""The bytes of logs: one file per attempt below the data folder.

The database says how long a log is; a file that is longer holds garbage from a crash, which the next
append overwrites, and nobody ever reads past the length in the database.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coordinator.store.full_disk import disk_may_be_full

CHUNK = 1024 * 1024


class LogFiles:
    """Log bytes by (build, step, attempt). Ids are ours, so they are safe as names."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, build_id: str, step_id: str, attempt: int) -> Path:
        return self._root / build_id[-2:] / build_id / step_id / f"{attempt}.log"

    @disk_may_be_full()
    def write(self, path: Path, offset: int, data: bytes) -> None:
        """Put `data` at `offset`; what stood behind it is cut off."""
        with self._opened(path) as descriptor:
            view = memoryview(data)
            while view:
                written = os.pwrite(descriptor, view, offset)
                view = view[written:]
                offset += written
            os.ftruncate(descriptor, offset)

    @disk_may_be_full()
    def read(self, path: Path, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`; fewer when the file is shorter."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return b""
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def size(self, path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:
            return 0

    @disk_may_be_full()
    def seal(self, path: Path, size: int) -> str:
        """Force the first `size` bytes to the disk and return their SHA-256; "" when they are not there."""
        digest = hashlib.sha256()
        if size == 0:
            return digest.hexdigest()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return ""
        try:
            offset = 0
            while offset < size:
                data = os.pread(descriptor, min(CHUNK, size - offset), offset)
                if not data:
                    return ""
                digest.update(data)
                offset += len(data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        _sync_folder(path.parent)
        return digest.hexdigest()

    @disk_may_be_full()
    def remove(self, build_id: str, step_id: str, attempt: int) -> None:
        """The log of one attempt, and folders that are empty without it."""
        path = self.path(build_id, step_id, attempt)
        path.unlink(missing_ok=True)
        for folder in (path.parent, path.parent.parent):
            try:
                folder.rmdir()
            except OSError:
                return  # something else lies there, or it is gone already

    @disk_may_be_full()
    def remove_build(self, build_id: str) -> None:
        """All logs of a build."""
        folder = self._root / build_id[-2:] / build_id
        if folder.exists():
            shutil.rmtree(folder)

    def list_builds(self, *, older_than_s: float, now_s: float) -> Iterator[list[str]]:
        """The builds that have had a folder for so long, in several lists."""
        for folder in sorted(self._root.iterdir()):
            yield [one.name for one in list_older(folder, older_than_s=older_than_s, now_s=now_s)]

    @contextmanager
    def _opened(self, path: Path) -> Iterator[int]:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, flags, 0o600)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def list_older(folder: Path, *, older_than_s: float, now_s: float) -> list[Path]:
    """What lies in a folder and was not touched for so long."""
    found = []
    for path in sorted(folder.iterdir()):
        try:
            if now_s - path.stat().st_mtime > older_than_s:
                found.append(path)
        except FileNotFoundError:
            continue  # it has just gone
    return found


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
