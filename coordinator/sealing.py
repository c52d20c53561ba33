"""Seals the values of secrets and opens them again; the only file that knows the cipher.

A sealed value is a random nonce and what AES-256-GCM makes of the value. Where the value belongs is
authenticated with it: in another row, project or name it does not open.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
NONCE_BYTES = 12
_FORMAT = b"buildmill secret 1"


class CannotOpen(Exception):
    """The key is not here, or this is not what was sealed for this place. Says nothing of the value."""


@dataclass(frozen=True)
class Place:
    """Where a sealed value belongs."""

    row_id: str
    project_id: str
    name: str

    def spelled(self) -> bytes:
        """Unmistakable: none of the parts can hold NUL."""
        return b"\0".join([_FORMAT, *(part.encode() for part in (self.row_id, self.project_id, self.name))])


@dataclass(frozen=True)
class Sealed:
    """What is stored: which key opens it, and the sealed bytes."""

    key_id: str
    sealed: bytes


class SecretKeys:
    """The keys of this coordinator: the first seals, each of them opens."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        if not keys or any(len(key) != KEY_BYTES for key in keys):
            raise ValueError(f"at least one key of {KEY_BYTES} bytes is needed")
        self._ciphers = {key_id(key): AESGCM(key) for key in keys}
        self._first = key_id(keys[0])

    @property
    def ids(self) -> Collection[str]:
        return self._ciphers.keys()

    def seal(self, value: str, place: Place) -> Sealed:
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._ciphers[self._first].encrypt(nonce, value.encode(), place.spelled())
        return Sealed(self._first, nonce + sealed)

    def open(self, found: Sealed, place: Place) -> str:
        cipher = self._ciphers.get(found.key_id)
        if cipher is None:
            raise CannotOpen(f"the key {found.key_id} is not in the key file")
        nonce, sealed = found.sealed[:NONCE_BYTES], found.sealed[NONCE_BYTES:]
        try:
            return cipher.decrypt(nonce, sealed, place.spelled()).decode()
        except (InvalidTag, ValueError) as error:
            raise CannotOpen("it is damaged, or it was sealed for another place") from error


def key_id(key: bytes) -> str:
    """The name of a key, which tells nothing of it."""
    return hashlib.sha256(b"buildmill secrets key id" + key).hexdigest()[:16]
