"""Ends what git still does for a life of this runner that was killed."""

import os
import select
import signal
import time
from pathlib import Path
from typing import Final

import structlog

from runner.errors import RunnerError

log = structlog.get_logger()

SETTLE_S: Final = 10.0


class NotEnded(RunnerError):
    """A process of a former life is still there although it was killed."""


def end_processes_at(home: Path) -> None:
    """Kill every process whose home is this folder; who holds the runner's lock knows that none is its own.

    Helpers of git have it from git, in whatever session and folder they work.
    """
    until = time.monotonic() + SETTLE_S
    while pids := [pid for pid in _all_pids() if _is_at_home(pid, home)]:
        if time.monotonic() >= until:
            raise NotEnded(f"git of a former life does not end: processes {pids}")
        for pid in pids:
            _end(pid, home, until)


def _end(pid: int, home: Path, until: float) -> None:
    """The number may be another process's by now: what is looked at is also what is killed."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if not _is_at_home(pid, home):
            return
        log.info("former_git_ended", pid=pid)
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], max(0.0, until - time.monotonic()))
    except ProcessLookupError:
        pass  # it has ended meanwhile
    finally:
        os.close(handle)


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _is_at_home(pid: int, home: Path) -> bool:
    """The same path may be another folder in a container: that of another runner."""
    place = Path(f"/proc/{pid}")
    try:
        if os.fsencode(f"HOME={home}") not in (place / "environ").read_bytes().split(b"\0"):
            return False
        return home.samefile(f"{place}/root{home}")
    except OSError:  # gone, another user's, or without such a folder
        return False
