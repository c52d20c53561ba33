"""Bytes by their digest on this machine: what was collected or fetched, and never changes again.

A blob stands below its folder under the first two digits of its SHA-256, read-only. It appears whole or
not at all. Blobs of a former life of the runner are read once before they are trusted, because a loss of
power may have left them short.
"""

import errno
import fcntl
import hashlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from runner.deadline import boot_s
from runner.durable import no_room_ends_the_step, sync_folder
from runner.errors import StepError, Unreachable
from runner.recency import RecentUse
from runner.spares import Spare
from shared.reasons import Reason

log = structlog.get_logger()

CHUNK_BYTES = 1024 * 1024
ZEROS = bytes(CHUNK_BYTES)
FICLONE = 0x40049409
NO_REFLINK = frozenset({errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM})
RECENTLY_S = 600.0


class LocalBlobs:
    """One folder of blobs; `evict` brings it below `max_bytes`."""

    def __init__(
        self, root: Path, *, max_bytes: int, durable: bool = False, clock: Callable[[], float] = boot_s
    ) -> None:
        self.root = root
        self.max_bytes = max_bytes
        self._durable = durable
        self._incoming = root / "incoming"
        self._trusted: set[str] = set()
        self._folders: set[str] = set()
        self._lock = threading.Lock()
        self._next_name = 0
        self._clock = clock
        self._recent = RecentUse(clock)
        self._gatherings: list[float] = []  # when each that is under way began
        self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
        for part in self._incoming.iterdir():
            part.unlink()  # what a former life did not finish

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """While somebody takes in one file after the other: none goes before a journal names them all."""
        began = self._clock()
        with self._lock:
            self._gatherings.append(began)
        try:
            yield
        finally:
            with self._lock:
                self._gatherings.remove(began)

    def put_fd(self, fd: int, *, max_bytes: int | None = None) -> tuple[str, int]:
        """Take in the content of an open file and return its digest and size.

        Both are those of the bytes that were kept, whatever happens to the file meanwhile.
        """
        head = os.pread(fd, CHUNK_BYTES, 0)
        if len(head) < CHUNK_BYTES:
            return self._put_small(head, max_bytes)
        with self._part() as part:
            sha256, size = _clone(fd, part.fd, max_bytes) or _copy(fd, part.fd, max_bytes)
            self._keep(part, sha256)
            return sha256, size

    @contextmanager
    def writer(self, sha256: str, size: int) -> Iterator["BlobWriter"]:
        """Take in bytes that are announced with their digest; they are kept only if they fulfil it."""
        with self._part() as part:
            writer = BlobWriter(part.fd, sha256, size)
            yield writer
            writer.check()
            self._keep(part, sha256)

    def path(self, sha256: str) -> Path | None:
        """Where a blob stands, or None; asking counts as use."""
        path = self._place(sha256)
        self._recent.note(sha256)
        try:
            if sha256 not in self._trusted and not self._is_sound(path, sha256):
                return None
            # Only the time of access: hard links of the blob are files in steps' workspaces.
            os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except FileNotFoundError:
            with self._lock:
                self._trusted.discard(sha256)
            return None
        return path

    def evict(self, keep: Collection[str] = ()) -> int:
        """Remove what was not used for longest until the rest fits; return the bytes set free.

        What is named in `keep`, was used in the last ten minutes or since a gathering that goes on began
        stays, whatever its size.
        """
        blobs = sorted(self._list_blobs(), key=lambda blob: blob.used_at)
        excess = sum(blob.size for blob in blobs) - self.max_bytes
        freed = 0
        for blob in blobs:
            if freed >= excess:
                break
            if blob.sha256 not in keep and self._drop(blob):
                freed += blob.size
        if freed:
            log.info("outputs_removed", bytes=freed)
        return freed

    def spares(self, keep: Collection[str] = ()) -> Iterator[Spare]:
        """What could go for want of room; a blob that some workspace links to sets nothing free."""
        for blob in sorted(self._list_blobs(), key=lambda blob: blob.used_at):
            is_recent = self._recent.is_within(blob.sha256, self._untouchable_s())
            if blob.sha256 not in keep and not is_recent and blob.links == 1:
                yield Spare("output", blob.sha256, blob.used_at, blob.size, partial(self._drop, blob))

    def _drop(self, blob: "_Blob") -> bool:
        with self._recent.unless_within(blob.sha256, self._untouchable_s()) as is_free:
            if not is_free:
                return False
            with self._lock:
                self._trusted.discard(blob.sha256)
            try:
                blob.path.unlink()
            except FileNotFoundError:
                return False
        return True

    def _untouchable_s(self) -> float:
        with self._lock:
            began = min(self._gatherings, default=self._clock())
        return max(RECENTLY_S, self._clock() - began + RECENTLY_S)

    def _put_small(self, content: bytes, max_bytes: int | None) -> tuple[str, int]:
        """Most files are small, and known already: those cost no file of their own."""
        _refuse_beyond(len(content), max_bytes)
        sha256 = hashlib.sha256(content).hexdigest()
        if self.path(sha256) is None:
            with self._part() as part:
                _write_at(part.fd, content, 0)
                self._keep(part, sha256)
        return sha256, len(content)

    def _place(self, sha256: str) -> Path:
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ValueError(f"not a digest: {sha256[:80]!r}")
        return self.root / sha256[:2] / sha256

    def _is_sound(self, path: Path, sha256: str) -> bool:
        with path.open("rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != sha256:
            log.warning("blob_damaged", sha256=sha256)
            path.unlink(missing_ok=True)
            return False
        with self._lock:
            self._trusted.add(sha256)
        return True

    def _list_blobs(self) -> Iterator["_Blob"]:
        for folder in os.scandir(self.root):
            if len(folder.name) != 2:
                continue
            for entry in os.scandir(folder):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield _Blob(entry.name, Path(entry.path), status.st_size, status.st_atime, status.st_nlink)

    @contextmanager
    def _part(self) -> Iterator["_Part"]:
        with self._lock:
            self._next_name += 1
            path = self._incoming / str(self._next_name)
        with no_room_ends_the_step("outputs cannot be kept"):
            part = _Part(path)
            try:
                yield part
            finally:
                part.close()

    def _keep(self, part: "_Part", sha256: str) -> None:
        place = self._place(sha256)
        if self.path(sha256) is not None:
            return  # these bytes are here already
        if place.parent.name not in self._folders:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            self._folders.add(place.parent.name)
        if self._durable:
            os.fsync(part.fd)
        part.path.rename(place)
        if self._durable:
            sync_folder(place.parent)
        with self._lock:
            self._trusted.add(sha256)


class BlobWriter:
    """Counts and hashes what arrives."""

    def __init__(self, fd: int, sha256: str, size: int) -> None:
        self.received = 0
        self._fd = fd
        self._sha256 = sha256
        self._size = size
        self._digest = hashlib.sha256()

    def write(self, data: bytes) -> None:
        if self.received + len(data) > self._size:
            raise Unreachable(f"more than the {self._size} bytes announced came for blob {self._sha256}")
        _write_at(self._fd, data, self.received)
        self._digest.update(data)
        self.received += len(data)

    def check(self) -> None:
        if self.received != self._size or self._digest.hexdigest() != self._sha256:
            raise Unreachable(f"blob {self._sha256} arrived damaged, {self.received} of {self._size} bytes")


@dataclass(frozen=True)
class _Blob:
    sha256: str
    path: Path
    size: int
    used_at: float
    links: int


class _Part:
    """A file nobody sees yet; gone on close unless it was renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(path, flags, 0o444)
        os.fchmod(self.fd, 0o444)

    def close(self) -> None:
        os.close(self.fd)
        self.path.unlink(missing_ok=True)


def _clone(source: int, target: int, max_bytes: int | None) -> tuple[str, int] | None:
    """Share the file's blocks where the file system can, and hash the copy; None where it cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno in NO_REFLINK:
            return None
        raise
    size = os.fstat(target).st_size
    _refuse_beyond(size, max_bytes)
    digest = hashlib.sha256()
    place = 0
    while chunk := os.pread(target, CHUNK_BYTES, place):
        digest.update(chunk)
        place += len(chunk)
    return digest.hexdigest(), place


def _copy(source: int, target: int, max_bytes: int | None) -> tuple[str, int]:
    digest = hashlib.sha256()
    size = 0
    while chunk := os.pread(source, CHUNK_BYTES, size):
        _refuse_beyond(size + len(chunk), max_bytes)
        if len(chunk) < CHUNK_BYTES or chunk != ZEROS:  # what is a hole stays one
            _write_at(target, chunk, size)
        digest.update(chunk)
        size += len(chunk)
    os.ftruncate(target, size)
    return digest.hexdigest(), size


def _refuse_beyond(size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise StepError(Reason.DISK_LIMIT, f"a file grew beyond {max_bytes} bytes while it was collected")


def _write_at(fd: int, data: bytes, place: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, place)
        rest = rest[written:]
        place += written
