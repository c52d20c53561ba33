"""Stays with one attempt that runs without a container; a program of its own, started by its path.

It lives on when the runner dies, takes in every process that the script leaves behind, and ends only when
all of them are dead. TERM is passed to the script's process group; USR1 kills everything.
It uses nothing but the standard library, for it runs without the rest of the project.

Usage: supervisor.py ATTEMPT_DIR WORKSPACE, with the step's environment as its own.
"""

import ctypes
import fcntl
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

RECORD: Final = "supervisor"
ENDED: Final = "ended"
ONCE: Final = "once"
PR_SET_CHILD_SUBREAPER: Final = 36
_WAITED: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD)
_KILL_ROUNDS: Final = 3000
_ROUND_S: Final = 0.01


def main() -> None:
    attempt_dir, workspace = Path(sys.argv[1]), sys.argv[2]
    ready, tell = os.pipe()
    if os.fork():  # the runner waits for this process only, so the supervisor is no child of it
        os.close(tell)
        os._exit(0 if os.read(ready, 1) else 1)
    os.close(ready)
    os.setsid()
    if not _is_the_first(attempt_dir):
        os.write(tell, b".")
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)  # what comes before the script runs is not lost
    _write(attempt_dir / RECORD, f"{os.getpid()} {began(os.getpid())}\n")
    os.write(tell, b".")
    os.close(tell)
    code = _stay(_start_launcher(attempt_dir, workspace))
    _kill_until_none()
    _write(attempt_dir / ENDED, f"{code}\n")


def _is_the_first(attempt_dir: Path) -> bool:
    """False when another supervisor is or was with this attempt: a killed runner had just started it."""
    lock = os.open(attempt_dir / ONCE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends
    except BlockingIOError:
        return False
    return not (attempt_dir / RECORD).exists()


def began(pid: int) -> str:
    """When a process began, in the kernel's ticks: with the id it names the process for good."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]


def _start_launcher(attempt_dir: Path, workspace: str) -> int:
    pid = os.fork()
    if pid:
        _lead_group(pid)
        return pid
    try:
        _lead_group(0)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # Python ignores them, and a script would inherit that
        os.chdir(workspace)
        os.execv("/bin/sh", ["/bin/sh", str(attempt_dir / "launch.sh")])  # noqa: S606
    except OSError as error:
        print(f"the script cannot be started: {error}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(126)


def _lead_group(pid: int) -> None:
    """Give the launcher its own group; parent and child both do, so that neither need wait."""
    try:
        os.setpgid(pid, 0)
    except OSError:
        pass  # the other one was faster


def _stay(launcher: int) -> int:
    """Pass signals on until the launcher has ended; its exit code as a shell would say it."""
    while True:
        came = signal.sigwait(_WAITED)
        if came == signal.SIGTERM:
            _send_group(launcher, signal.SIGTERM)
        elif came == signal.SIGUSR1:
            _kill_once()
        code = _reap(launcher)
        if code is not None:
            return code


def _send_group(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        pass  # it ends right now


def _reap(launcher: int) -> int | None:
    """Collect all that have died; the launcher's code when it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == launcher:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else 128 - code


def _kill_once() -> bool:
    """Kill all descendants of this moment; False when there are none."""
    rest = _descendants()
    for pid in rest:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has just died
    return bool(rest)


def _kill_until_none() -> None:
    """Kill again and again, for what has just been born falls in the next round."""
    for _ in range(_KILL_ROUNDS):
        if not _kill_once():
            return
        _reap(0)
        time.sleep(_ROUND_S)


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue  # it has just died
            children.setdefault(int(fields.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found: list[int] = []
    waiting = [os.getpid()]
    while waiting:
        of_this = children.get(waiting.pop(), [])
        found += of_this
        waiting += of_this
    return found


def _write(path: Path, text: str) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)  # a reader sees all of it or nothing


if __name__ == "__main__":
    main()
