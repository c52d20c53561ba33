"""Bytes that no project has any more leave the store."""

from collections.abc import Collection
from pathlib import Path

from sqlmodel import Session

from coordinator.store import retention
from coordinator.store.blob_files import BlobFiles
from coordinator.store.dialect import hold_names


def drop_blobs(tx: Session, blobs: BlobFiles, digests: Collection[str]) -> list[Path]:
    """Take those of the blobs out of sight that no row names; who removes the paths frees the bytes.

    The same bytes may arrive in this moment: until this ends no upload of them is written down, and one
    that comes after finds that its file is gone and sends it again.
    """
    hold_names(tx, digests)
    unknown = sorted(set(digests) - retention.list_known_blobs(tx, digests))
    return [path for sha256 in unknown if (path := blobs.set_aside(sha256)) is not None]
