"""Time as a step has it: on the clock that counts from this machine's boot, which nobody can set.

What is measured here survives the runner's process, because it can be written down and read again; a clock
on the wall that jumps by an hour changes none of it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORDS_A_LIMIT = 4  # how often, at most, a talking step's last word is written down within its limit
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Deadline:
    """A moment on the clock that counts from this machine's boot, in seconds."""

    at_s: float
    boot: str

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(boot_s() + seconds, boot_id())

    @classmethod
    def recorded(cls, said: dict[str, Any] | None, *, otherwise_s: float) -> "Deadline":
        """The deadline a former life wrote down; a fresh one when the machine has booted since."""
        if said and said.get("boot") == boot_id():
            return cls(float(said["at_s"]), boot_id())
        return cls.after(otherwise_s)

    def left_s(self) -> float:
        return self.at_s - boot_s()

    def record(self) -> dict[str, Any]:
        return {"at_s": self.at_s, "boot": self.boot}


@dataclass(frozen=True)
class Moment:
    """When something happened."""

    at_s: float
    boot: str

    @classmethod
    def now(cls) -> "Moment":
        return cls(boot_s(), boot_id())

    @classmethod
    def recorded(cls, said: Mapping[str, Any] | None) -> "Moment | None":
        """What a former life wrote down; None when it did not, or when the machine has booted since."""
        if said and said.get("boot") == boot_id():
            return cls(float(said["at_s"]), boot_id())
        return None

    def age_s(self) -> float:
        return max(0.0, boot_s() - self.at_s)

    def record(self) -> dict[str, Any]:
        return {"at_s": self.at_s, "boot": self.boot}


class Silence:
    """How long a step has printed nothing, seen by the size of its log.

    Who takes over counts on only where nothing was printed meanwhile; a step is never ended too early.
    """

    def __init__(self, limit_s: float, said: Mapping[str, Any] | None, *, size: int) -> None:
        self._limit_s = limit_s
        self._size = size
        since = Moment.recorded(said)
        is_same = since is not None and said is not None and said.get("size") == size
        self._since = since if is_same and since is not None else Moment.now()
        self._written: Moment | None = self._since if is_same else None

    @property
    def is_too_long(self) -> bool:
        return self._since.age_s() >= self._limit_s

    def look(self, size: int) -> dict[str, Any] | None:
        """Take note of the log's size; what is to be written down for a later life, every now and then."""
        if size != self._size:
            self._size, self._since = size, Moment.now()
        elif self._since is self._written:
            return None
        if self._written is not None and self._written.age_s() < self._limit_s / RECORDS_A_LIMIT:
            return None
        self._written = self._since
        return {**self._since.record(), "size": self._size}


def boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
