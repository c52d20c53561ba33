"""Deletes folders slowly in the background, so that no step waits for it and no disk is kept busy.

What is thrown away is renamed at once, which is what makes room for a successor; the rest has time.
"""

import errno
import fcntl
import os
import stat
import threading
import time
from array import array
from pathlib import Path
from typing import Protocol

import structlog

from shared.ids import new_id

log = structlog.get_logger()

PAUSE_EVERY = 200
PAUSE_S = 0.005
MAX_DEPTH = 200
STOP_TIMEOUT_S = 10.0
STUBBORN_PAUSE_S = 600.0
MOST_STUBBORN = 10_000
# A folder that cannot be moved aside is deleted where it stands; on a full disk there may be no room to move.
NO_WAY = frozenset({errno.EXDEV, errno.EBUSY, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT})
# What `chattr` sets so that not even root removes a file, and how the kernel is asked about it.
GET_FLAGS, SET_FLAGS = 0x80086601, 0x40086602
IMMUTABLE_OR_APPEND_ONLY = 0x10 | 0x20


class Trash:
    """The folder `<state>/trash` and the thread that empties it."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "trash"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._stubborn: dict[str, float] = {}  # what could not be deleted, and when it is tried again
        self._lock = threading.Lock()
        self._idle = threading.Event()

    def start(self) -> None:
        """Begin to delete, first of all what a former life left."""
        self._thread = threading.Thread(target=self._run, name="trash", daemon=True)
        self._wake.set()
        self._thread.start()

    def close(self) -> None:
        """Stop deleting; what is left waits for the next start."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def throw(self, path: Path) -> None:
        """Take `path` away now and delete it later; harmless when it does not exist."""
        try:
            path.rename(self.folder / new_id())
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno not in NO_WAY:
                raise
            remove_tree(path)
        with self._lock:
            self._idle.clear()
            self._wake.set()

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until what was thrown away is deleted, as far as it can be; False when that takes longer."""
        if self._thread is None:
            self.empty()
            return True
        return self._idle.wait(timeout_s)

    def empty(self) -> None:
        """Delete everything now."""
        self._sweep(pause_s=0.0)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(timeout=60)
            self._wake.clear()
            self._sweep(pause_s=PAUSE_S)
            with self._lock:
                if not self._wake.is_set():
                    self._idle.set()

    def _sweep(self, *, pause_s: float) -> None:
        now = time.monotonic()
        for path in sorted(self.folder.iterdir()):
            if self._stop.is_set():
                return
            if now < self._stubborn.get(path.name, now):
                continue
            is_known = path.name in self._stubborn
            if remove_tree(path, pause_s=pause_s, stop=self._stop, is_told=is_known):
                self._stubborn.pop(path.name, None)
            elif is_known or len(self._stubborn) < MOST_STUBBORN:
                self._stubborn[path.name] = now + STUBBORN_PAUSE_S


def remove_tree(
    path: Path, *, pause_s: float = 0.0, stop: threading.Event | None = None, is_told: bool = False
) -> bool:
    """Delete a file or folder whatever its modes and depth, on its own file system only, following no link.

    What cannot be deleted stays and is said, unless it `is_told`; nobody's work depends on it.
    True when nothing withstood.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return True
    if not stat.S_ISDIR(found.st_mode):
        return _remove_file(path, is_told=is_told)
    sweep = _Sweep(path, found.st_dev, pause_s, stop)
    while sweep.goes_on():
        sweep.remove(sweep.waiting.pop())
    if sweep.failures and not is_told:
        log.warning(
            "some files could not be deleted", path=str(path), count=sweep.failures, first=sweep.first
        )
    return not sweep.failures


def _remove_file(path: Path, *, is_told: bool) -> bool:
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _insist_on(os.unlink, path.name, folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        if not is_told:
            log.warning("a file could not be deleted", path=str(path), cause=str(error))
        return False
    finally:
        os.close(folder)
    return True


def _insist_on(action: "_Removal", name: str, folder: int) -> None:
    """Remove it, after taking off what keeps even root from doing so."""
    try:
        action(name, dir_fd=folder)
    except PermissionError:
        if not _loosen_entry(name, folder):
            raise
        action(name, dir_fd=folder)


def _loosen_entry(name: str, folder: int) -> bool:
    """True when the flags of the folder or of the entry itself stood in the way."""
    loosened = _loosen(folder)
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return loosened  # opening a device or a FIFO may have effects
    try:
        entry = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError:
        return loosened
    try:
        return _loosen(entry) or loosened
    finally:
        os.close(entry)


def _loosen(fd: int) -> bool:
    flags = array("l", [0])
    try:
        fcntl.ioctl(fd, GET_FLAGS, flags, True)
        if not flags[0] & IMMUTABLE_OR_APPEND_ONLY:
            return False
        flags[0] &= ~IMMUTABLE_OR_APPEND_ONLY
        fcntl.ioctl(fd, SET_FLAGS, flags, True)
    except OSError:
        return False  # a file system without such flags, or a runner without the right to change them
    return True


class _Removal(Protocol):
    def __call__(self, name: str, /, *, dir_fd: int) -> None: ...


class _Sweep:
    """One deletion. Folders too deep to reach by their path are first moved up next to the root."""

    def __init__(self, root: Path, device: int, pause_s: float, stop: threading.Event | None) -> None:
        self.root = root
        self.device = device
        self.pause_s = pause_s
        self.stop = stop
        self.waiting = [root]
        self.failures = 0
        self.first = ""
        self.count = 0

    def goes_on(self) -> bool:
        return bool(self.waiting) and not (self.stop is not None and self.stop.is_set())

    def remove(self, top: Path) -> None:
        """Delete one folder from the leaves up, without recursion."""
        parent = os.open(top.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        chain: list[tuple[int, str, list[str]]] = []
        try:
            self._enter(parent, top.name, chain)
            while chain:
                if self.stop is not None and self.stop.is_set():
                    return
                folder, name, left = chain[-1]
                if left:
                    self._remove_entry(folder, left.pop(), chain)
                else:
                    chain.pop()
                    os.close(folder)
                    self._try(os.rmdir, name, chain[-1][0] if chain else parent)
        finally:
            for folder, _, _ in chain:
                os.close(folder)
            os.close(parent)

    def _enter(self, parent: int, name: str, chain: list[tuple[int, str, list[str]]]) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            try:
                folder = os.open(name, flags, dir_fd=parent)
            except PermissionError:
                os.chmod(name, 0o700, dir_fd=parent)
                folder = os.open(name, flags, dir_fd=parent)
        except OSError as error:
            self._note(error)
            return
        found = os.fstat(folder)
        if found.st_dev != self.device:
            os.close(folder)
            self._note(OSError(errno.EXDEV, "something is still mounted here", name))
            return
        if os.geteuid() != 0 and found.st_mode & 0o700 != 0o700:
            os.fchmod(folder, 0o700)
        chain.append((folder, name, os.listdir(folder)))  # noqa: PTH208 (by descriptor, not by name)

    def _remove_entry(self, folder: int, name: str, chain: list[tuple[int, str, list[str]]]) -> None:
        self.count += 1
        if self.pause_s and self.count % PAUSE_EVERY == 0:
            time.sleep(self.pause_s)
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode):
            self._try(os.unlink, name, folder)
        elif len(chain) < MAX_DEPTH:
            self._enter(folder, name, chain)
        else:
            self._move_up(folder, name)

    def _move_up(self, folder: int, name: str) -> None:
        place = self.root.with_name(new_id())
        try:
            os.rename(name, place, src_dir_fd=folder)
        except OSError as error:
            self._note(error)
        else:
            self.waiting.append(place)

    def _try(self, action: "_Removal", name: str, folder: int) -> None:
        try:
            _insist_on(action, name, folder)
        except FileNotFoundError:
            return
        except OSError as error:
            self._note(error)

    def _note(self, error: OSError) -> None:
        self.failures += 1
        self.first = self.first or str(error)
