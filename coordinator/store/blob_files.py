"""Bytes by their digest: artifacts, below the data folder. Client strings never become paths."""

import hashlib
import os
import secrets
from pathlib import Path

from coordinator.errors import DigestMismatch


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

    def part(self, key: str) -> "IncomingBlob":
        """A place for bytes that arrive in several requests; `key` is made by us."""
        name = hashlib.sha256(key.encode()).hexdigest()
        return IncomingBlob(self, self._incoming / f"part-{name}", keep=True)

    def sweep(self, *, older_than_s: float, now_s: float) -> int:
        """Remove what never became a blob; returns how many."""
        swept = 0
        for path in self._incoming.iterdir():
            try:
                if now_s - path.stat().st_mtime > older_than_s:
                    path.unlink()
                    swept += 1
            except FileNotFoundError:
                continue  # its upload has just finished
        return swept


class IncomingBlob:
    """Bytes on their way into the store."""

    def __init__(self, blobs: BlobFiles, path: Path, *, keep: bool = False) -> None:
        self._blobs = blobs
        self._path = path
        self._keep = keep
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND
        self._descriptor = os.open(path, flags, 0o600)
        self.received = os.fstat(self._descriptor).st_size

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self.received += len(data)

    def commit(self, sha256: str) -> int:
        """Verify the digest and make the blob visible; returns its size."""
        digest = hashlib.sha256()
        offset = 0
        while data := os.pread(self._descriptor, 1024 * 1024, offset):
            digest.update(data)
            offset += len(data)
        if digest.hexdigest() != sha256:
            self.discard()
            raise DigestMismatch("the bytes have another digest than announced")
        os.fsync(self._descriptor)
        target = self._blobs.path(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._path.rename(target)
        self._close()
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return offset

    def discard(self) -> None:
        self._close()
        self._path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go after a request: parts stay for the next one, the rest goes."""
        if self._descriptor < 0:
            return
        if self._keep:
            self._close()
        else:
            self.discard()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
