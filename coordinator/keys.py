"""Keys and first credentials: made at the first start, files of mode 0600 below the data folder."""

import os
import re
import secrets
import stat
from collections.abc import Callable, Collection
from pathlib import Path

from coordinator.access_tokens import AccessTokens
from coordinator.api.state import Credentials
from coordinator.sealing import SecretKeys

KEY_BYTES = 32
SECRETS_KEY = "secrets-key"
AUDIT_KEY = "audit-key"
TOKEN_KEYS = "token-keys"  # noqa: S105 - a file name
_KEY = re.compile(r"[0-9a-f]{64}")


class UnusableKeys(Exception):
    """A key file is not the one that is needed, or no good; the message says the remedy."""


def load_lease_key(data: Path) -> bytes:
    """The key that proves leases; the same after every restart."""
    return bytes.fromhex(_load(data, "lease-key", lambda: secrets.token_hex(KEY_BYTES)))


def load_credentials(data: Path) -> Credentials:
    """The administrator's token and the token that enrols runners."""
    return Credentials(
        admin_token=_load(data, "admin-token", lambda: secrets.token_urlsafe(32)),
        registration_token=_load(data, "registration-token", lambda: secrets.token_urlsafe(32)),
    )


def load_secret_keys(data: Path, needed: Collection[str]) -> SecretKeys:
    """The keys of the projects' secrets, one per line; `needed` are the keys that stored secrets name.

    A key is made only where no secret is stored: a new key could open none of them.
    """
    path = data / "keys" / SECRETS_KEY
    if needed and not path.exists():
        raise UnusableKeys(
            f"{path} is missing, and nothing else opens the stored secrets: put it back from a backup"
        )
    keys = SecretKeys(_load_keys(data, SECRETS_KEY))
    missing = sorted(set(needed) - set(keys.ids))
    if missing:
        raise UnusableKeys(
            f"{path} lacks a key that stored secrets need ({', '.join(missing)}): it is another file than "
            "the one they were sealed with, or a line of it was removed too early"
        )
    return keys


def load_access_tokens(data: Path) -> AccessTokens:
    """What signs the tokens of users: the first key of the file; the others only verify."""
    keys = _load_keys(data, TOKEN_KEYS)
    try:
        return AccessTokens(keys)
    except ValueError as error:
        path = data / "keys" / TOKEN_KEYS
        raise UnusableKeys(
            f"{path} holds a key that can be guessed: {error}; remove the file, and the next start makes one"
        ) from error


def load_audit_key(data: Path) -> bytes:
    """What seals the checkpoints of the audit trail; made only where there are none yet."""
    path = data / "keys" / AUDIT_KEY
    if not path.exists() and checkpoints_path(data).exists():
        raise UnusableKeys(
            f"{path} is missing, and {checkpoints_path(data)} was sealed with it: put it back from a backup, "
            "or move the checkpoints to another place, where nothing can verify them"
        )
    return _load_keys(data, AUDIT_KEY)[0]


def find_audit_key(data: Path) -> bytes | None:
    """The same, None where none was ever made."""
    return _load_keys(data, AUDIT_KEY)[0] if (data / "keys" / AUDIT_KEY).exists() else None


def checkpoints_path(data: Path) -> Path:
    """Where the checkpoints of the audit trail are written down."""
    return data / "audit" / "checkpoints"


def _load_keys(data: Path, name: str) -> list[bytes]:
    """Keys of 32 bytes in hexadecimal digits, one per line; made at the first start."""
    path = data / "keys" / name
    lines = _load(data, name, lambda: secrets.token_hex(KEY_BYTES)).split()
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise UnusableKeys(f"{path} holds keys that others may read: chmod 600 {path}")
    if not lines or not all(_KEY.fullmatch(line) for line in lines):
        raise UnusableKeys(f"{path} must hold keys of 64 hexadecimal digits, one per line: put it back")
    return [bytes.fromhex(line) for line in lines]


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
