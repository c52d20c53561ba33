"""Passwords as they are stored: argon2id; the only file that knows the hash.

Hashing takes tens of milliseconds and 64 MiB on purpose: call it in a thread, a few at a time.
"""

import asyncio
import unicodedata
from functools import cache

from argon2 import PasswordHasher, Type
from argon2.exceptions import InvalidHashError, VerificationError

MIN_LENGTH = 12
MAX_LENGTH = 256
MAX_AT_ONCE = 2
_HASHER = PasswordHasher(time_cost=3, memory_cost=64 * 1024, parallelism=1, type=Type.ID)


class WeakPassword(ValueError):
    """The password is too short, too long, or all of one character; the message never repeats it."""


def hash_password(password: str) -> str:
    """What is stored of a password, or WeakPassword."""
    require_strong(password)
    return _HASHER.hash(_normal(password))


def require_strong(password: str) -> None:
    """WeakPassword for one that may not be set; quick, unlike the hashing."""
    password = _normal(password)
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise WeakPassword(f"must have {MIN_LENGTH} to {MAX_LENGTH} characters")
    if len(set(password)) < 4:
        raise WeakPassword("must have at least 4 different characters")


def is_password(stored: str | None, password: str) -> bool:
    """Whether this is the password; as slow where there is none to compare with."""
    try:
        is_right = _HASHER.verify(stored or _nobody(), _normal(password)[: MAX_LENGTH + 1])
    except (VerificationError, InvalidHashError):
        return False
    return is_right and stored is not None


class PasswordChecks:
    """Compares passwords off the event loop, a few at a time, so that logins leave the machine to others."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(MAX_AT_ONCE)

    async def is_password(self, stored: str | None, password: str) -> bool:
        async with self._slots:
            return await asyncio.to_thread(is_password, stored, password)

    async def hash_password(self, password: str) -> str:
        async with self._slots:
            return await asyncio.to_thread(hash_password, password)


@cache
def _nobody() -> str:
    """A hash that no password has, made with the same cost."""
    return _HASHER.hash("nobody's " * 4)


def _normal(password: str) -> str:
    """One spelling for what keyboards send in several."""
    return unicodedata.normalize("NFKC", password)
