"""What can be seen of a container's processes, and done to them, while their engine does not answer.

They are of this machine only when their control groups name the container; a remote engine's are not seen,
and neither are those of a runner that sits in a container itself.
"""

import contextlib
import os
import re
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from runner.errors import StillAlive

CONTAINER: Final = "container"
SEEN: Final = "seen"
PAUSE_S: Final = 0.05
_ID: Final = re.compile(r"[0-9a-f]{64}")


def note_container(attempt_dir: Path, container: str) -> None:
    """Written down before it is started: from then on its processes can be told from all others."""
    _write(attempt_dir / CONTAINER, container)


def note_seen(attempt_dir: Path, container: str, pid: int) -> None:
    """Once they were seen from here, not to see them any more means that they are dead."""
    if pid > 0 and not (attempt_dir / SEEN).exists() and _is_of(pid, container):
        _write(attempt_dir / SEEN, _our_view())


def outlives(attempt_dir: Path, timeout_s: float) -> bool:
    """True when the container's first process, with which all others die, is seen alive all the time."""
    first = _first_of(_find(attempt_dir))
    if first is None:
        return False
    with contextlib.suppress(ProcessLookupError), _opened(first) as descriptor:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return not poll.poll(int(timeout_s * 1000))
    return False


def has_died(attempt_dir: Path) -> bool:
    """True when its processes were seen from here before, and none is any more."""
    seen = attempt_dir / SEEN
    return seen.is_file() and seen.read_text(encoding="utf-8") == _our_view() and not _find(attempt_dir)


def terminate(attempt_dir: Path) -> bool:
    """Send TERM to the first process, as the engine does; False when none is seen."""
    first = _first_of(_find(attempt_dir))
    if first is None:
        return False
    _send(attempt_dir, first, signal.SIGTERM)
    return True


def kill(attempt_dir: Path, *, timeout_s: float) -> bool:
    """Kill all that is seen; True when it is known to be dead then, StillAlive when it withstands."""
    until = time.monotonic() + timeout_s
    was_seen = has_died(attempt_dir)
    while pids := _find(attempt_dir):
        was_seen = True
        if time.monotonic() > until:
            raise StillAlive(f"{len(pids)} processes of {attempt_dir.name} live on, and the engine is away")
        for pid in pids:
            _send(attempt_dir, pid, signal.SIGKILL)
        time.sleep(PAUSE_S)
    return was_seen


def _send(attempt_dir: Path, pid: int, number: signal.Signals) -> None:
    """By a descriptor, looked at once more: the id may belong to somebody else by now."""
    with contextlib.suppress(ProcessLookupError, PermissionError), _opened(pid) as descriptor:
        if _is_of(pid, _container_of(attempt_dir)):
            signal.pidfd_send_signal(descriptor, number)


@contextlib.contextmanager
def _opened(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _find(attempt_dir: Path) -> list[int]:
    container = _container_of(attempt_dir)
    if not _ID.fullmatch(container):
        return []
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if _is_of(pid, container)]


def _is_of(pid: int, container: str) -> bool:
    """A process that has ended and waits for its parent counts as dead."""
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8")
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
    except OSError:
        return False
    return bool(container) and container in groups and state.split()[0] not in ("Z", "X")


def _first_of(pids: list[int]) -> int | None:
    """The one with the fewest process namespaces around it and the lowest id in the last of them."""
    ranked = [(rank, pid) for pid in pids if (rank := _rank(pid)) is not None]
    return min(ranked)[1] if ranked else None


def _rank(pid: int) -> tuple[int, int] | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    names = re.search(r"^NSpid:\s+(.+)$", status, re.MULTILINE)
    ids = names[1].split() if names else [str(pid)]
    return len(ids), int(ids[-1])


def _container_of(attempt_dir: Path) -> str:
    file = attempt_dir / CONTAINER
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _our_view() -> str:
    return str(Path("/proc/self/ns/pid").readlink())


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)
