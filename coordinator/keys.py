"""Keys and first credentials: made at the first start, files of mode 0600 below the data folder."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from coordinator.api.state import Credentials

KEY_BYTES = 32


def load_lease_key(data: Path) -> bytes:
    """The key that proves leases; the same after every restart."""
    return bytes.fromhex(_load(data, "lease-key", lambda: secrets.token_hex(KEY_BYTES)))


def load_credentials(data: Path) -> Credentials:
    """The administrator's token and the token that enrols runners."""
    return Credentials(
        admin_token=_load(data, "admin-token", lambda: secrets.token_urlsafe(32)),
        registration_token=_load(data, "registration-token", lambda: secrets.token_urlsafe(32)),
    )


def _load(data: Path, name: str, make: Callable[[], str]) -> str:
    folder = data / "keys"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        _write_once(path, make())
    return path.read_text().strip()


def _write_once(path: Path, text: str) -> None:
    """Whole or absent; of two processes that start at once, the first one's key stays."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(descriptor, text.encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return  # the other process was first
    finally:
        temporary.unlink()
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
