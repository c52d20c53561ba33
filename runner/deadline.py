"""A deadline that survives the runner's process and that no clock change moves."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Deadline:
    """A moment on the clock that counts from this machine's boot, in seconds."""

    at_s: float
    boot: str

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(time.clock_gettime(time.CLOCK_BOOTTIME) + seconds, boot_id())

    @classmethod
    def recorded(cls, said: dict[str, Any] | None, *, otherwise_s: float) -> "Deadline":
        """The deadline a former life wrote down; a fresh one when the machine has booted since."""
        if said and said.get("boot") == boot_id():
            return cls(float(said["at_s"]), boot_id())
        return cls.after(otherwise_s)

    def left_s(self) -> float:
        return self.at_s - time.clock_gettime(time.CLOCK_BOOTTIME)

    def record(self) -> dict[str, Any]:
        return {"at_s": self.at_s, "boot": self.boot}


def boot_id() -> str:
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
