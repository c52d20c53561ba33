"""Names a process of this machine so that others can tell later whether it still lives."""

import os
from pathlib import Path


def name_this_process() -> str:
    return f"{_where()} {os.getpid()} {_began(os.getpid())}"


def is_dead(name: str) -> bool:
    """True only when it is certain: a process of another machine or container may well live."""
    where, _, process = name.partition(" ")
    if where != _where():
        return False
    pid, _, began = process.partition(" ")
    return not pid.isdigit() or _began(int(pid)) != began


def _where() -> str:
    """This boot of this machine and the view of processes that we have."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _began(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        return "never"
