"""Identifiers: lower-case UUIDs of version 7, made by us, sorted by the time they were made."""

import os
import time
from uuid import UUID


def new_id() -> str:
    """A fresh id; ids made later sort later (to the millisecond)."""
    milliseconds = time.time_ns() // 1_000_000
    random_bits = int.from_bytes(os.urandom(10), "big")
    value = (milliseconds & (2**48 - 1)) << 80
    value |= 0x7 << 76
    value |= (random_bits >> 68 & 0xFFF) << 64
    value |= 0b10 << 62
    value |= random_bits & (2**62 - 1)
    return str(UUID(int=value))


def is_id(text: str) -> bool:
    """True for the canonical lower-case form only."""
    if len(text) != 36:
        return False
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False
