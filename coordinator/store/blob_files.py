"""Bytes by their digest: artifacts, below the data folder. Client strings never become paths."""

import fcntl
import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

from coordinator.errors import DigestMismatch, Unavailable
from coordinator.store.full_disk import disk_may_be_full
from coordinator.store.log_files import list_older

_LOCK_TRIES = 3


class BlobFiles:
    """A blob is whole or absent: temp, fsync, rename, fsync of the folder."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._incoming = root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self._root / sha256[:2] / sha256

    def has(self, sha256: str, size: int) -> bool:
        try:
            return self.path(sha256).stat().st_size == size
        except FileNotFoundError:
            return False

    def incoming(self) -> "IncomingBlob":
        """A place for bytes that arrive now."""
        return IncomingBlob(self, self._incoming / secrets.token_hex(16))

    def part(self, step_id: str, attempt: int, sha256: str) -> "IncomingBlob":
        """A place for bytes that arrive in several requests; Unavailable while another one writes there."""
        name = hashlib.sha256(f"{step_id}/{attempt}/{sha256}".encode()).hexdigest()
        return IncomingBlob(self, self._incoming / f"part-{name}", keep=True)

    def set_aside(self, sha256: str) -> Path | None:
        """Take a blob out of sight; its bytes are freed when the path that is returned is removed."""
        aside = self._incoming / f"gone-{secrets.token_hex(16)}"
        try:
            self.path(sha256).rename(aside)
        except FileNotFoundError:
            return None
        return aside

    def list_blobs(self, *, older_than_s: float, now_s: float) -> Iterator[list[str]]:
        """The digests that have lain here for so long, in several lists."""
        for folder in sorted(self._root.iterdir()):
            if folder != self._incoming:
                yield [one.name for one in list_older(folder, older_than_s=older_than_s, now_s=now_s)]

    def sweep(self, *, older_than_s: float, now_s: float) -> int:
        """Remove what never became a blob; returns how many."""
        swept = 0
        for path in self._incoming.iterdir():
            try:
                if now_s - path.stat().st_mtime > older_than_s:
                    IncomingBlob(self, path).discard()
                    swept += 1
            except (FileNotFoundError, Unavailable):
                continue  # its upload has just finished, or goes on
        return swept


class IncomingBlob:
    """Bytes on their way into the store, in a file that nobody else writes to until this one lets go."""

    def __init__(self, blobs: BlobFiles, path: Path, *, keep: bool = False) -> None:
        self._blobs = blobs
        self._path = path
        self._keep = keep
        # a request that is given up closes the file while a thread may still write: never in between
        self._guard = threading.Lock()
        self._descriptor = _open_alone(path)
        self.received = os.fstat(self._descriptor).st_size

    @disk_may_be_full()
    def write(self, data: bytes) -> None:
        view = memoryview(data)
        with self._guard:
            self._require_open()
            while view:
                view = view[os.write(self._descriptor, view) :]
        self.received += len(data)

    @disk_may_be_full()
    def commit(self, sha256: str) -> int:
        """Verify the digest and make the blob visible; returns its size."""
        with self._guard:
            self._require_open()
            digest = hashlib.sha256()
            offset = 0
            while data := os.pread(self._descriptor, 1024 * 1024, offset):
                digest.update(data)
                offset += len(data)
            if digest.hexdigest() != sha256:
                self._discard()
                raise DigestMismatch("the bytes have another digest than announced")
            try:
                os.fsync(self._descriptor)
            except OSError:
                self._discard()  # a second fsync might succeed without these bytes
                raise
            target = self._blobs.path(sha256)
            target.parent.mkdir(parents=True, exist_ok=True)
            # who waits for the lock finds afterwards that the file is no longer here, and writes nothing
            self._path.rename(target)
            self._close()
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return offset

    def discard(self) -> None:
        with self._guard:
            self._discard()

    def release(self) -> None:
        """Let go after a request: parts stay for the next one, the rest goes."""
        with self._guard:
            if self._descriptor < 0:
                return
            if self._keep:
                self._close()
            else:
                self._discard()

    def _require_open(self) -> None:
        if self._descriptor < 0:
            raise Unavailable("the upload was given up")

    def _discard(self) -> None:
        """The file goes before its lock does, so that it is never somebody else's."""
        if self._descriptor >= 0:
            self._path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@disk_may_be_full()
def _open_alone(path: Path) -> int:
    """The file at `path`, locked; one that was stored or removed before the lock was ours is left alone."""
    for _ in range(_LOCK_TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(path.stat(), os.fstat(descriptor)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise Unavailable("another request is sending these bytes") from error
        except FileNotFoundError:
            pass  # it was stored before the lock was ours: begin anew
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise Unavailable("other requests are sending these bytes")
