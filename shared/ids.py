"""Identifiers: lower-case UUIDs of version 7, made by us, sorted by the time they were made."""

import os
import threading
import time
from uuid import UUID

_TICK_NS = 1_000_000 / 4096  # what the bits behind the milliseconds count
_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """A fresh id; of two that one process has made the later one sorts later, whatever its clock does."""
    ticks = _next_tick()
    text = f"{ticks >> 12:012x}7{ticks & 0xFFF:03x}{_variant_and_random():016x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def is_id(text: str) -> bool:
    """True for the canonical lower-case form only."""
    if len(text) != 36:
        return False
    try:
        return str(UUID(text)) == text
    except ValueError:
        return False


def canonical_id(text: str) -> str:
    """An id as we spell it, whoever wrote it in capitals; whatever is no id stays as it is."""
    if len(text) != 36 or text.islower():
        return text
    lowered = text.lower()
    return lowered if is_id(lowered) else text


def _next_tick() -> int:
    """The time in 4096ths of a millisecond, and never the same twice."""
    global _last
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    now = (milliseconds & (2**48 - 1)) << 12 | int(rest / _TICK_NS)
    with _lock:
        _last = max(now, _last + 1)
        return _last


def _variant_and_random() -> int:
    return 0b10 << 62 | int.from_bytes(os.urandom(8), "big") >> 2
