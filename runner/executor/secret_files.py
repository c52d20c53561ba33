"""The secrets of an attempt on their way into its step: a file in memory, which no disk ever sees.

The launcher reads it into the environment and empties it before the script begins; the runner removes it.
The engine knows its path alone, so what it shows of a container holds no value.
"""

import contextlib
import os
import stat
import threading
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import structlog

from runner.errors import StepError
from runner.mounts import find_mount, list_mounts, mount_tmpfs, unmount
from shared.reasons import Reason
from shared.script import quote

FOLDER: Final = "secrets"
FILE: Final = "values"
SPARE_BYTES: Final = 64 * 1024
IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
SHARED_FOLDERS: Final = (Path("/dev/shm"), Path("/run"))  # noqa: S108 - only a private folder in them is used

log = structlog.get_logger()


class SecretFiles:
    """The files of one runner; any number of threads may use it, each for an attempt of its own.

    Each file lies on a tmpfs of its own below the state folder: the step can write into it, and so fills
    nothing but what was made for it. Where the runner may not mount, it lies in a private folder on the
    machine's own tmpfs, which is named after the runner and outlives its identity: `former_ids` are those
    that this runner had.
    """

    def __init__(self, state: Path, runner: str, former_ids: Collection[str] = ()) -> None:
        self._own = state / FOLDER
        self._private = _private_of(runner)
        self._former = {_private_of(one) for one in former_ids} - {self._private}
        self._lock = threading.Lock()
        self._placed: set[str] = set()  # in this life, and not removed since
        self._unheld: set[str] = set()  # those of them that no attempt held when we last swept

    def place(self, name: str, values: Mapping[str, str], *, for_any_user: bool) -> Path:
        """Write what the launcher of attempt `name` is to read; a second call writes it anew.

        The folder is closed to other users of the machine, so a step that runs as another user than root can
        be let read (and empty) its file.
        """
        with self._lock:
            self._placed.add(name)
        text = "".join(f"export {key}={quote(value)}\n" for key, value in values.items()).encode()
        path = self._find(name) or self._make_place(name, len(text))
        part = path.with_name(_part_of(name))
        try:
            part.unlink(missing_ok=True)  # a former life was killed while it wrote
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
                os.fchmod(descriptor, 0o666 if for_any_user else 0o600)
            part.rename(path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise StepError(
                Reason.INTERNAL, f"the secrets cannot be put into memory: {error.strerror}"
            ) from error
        return path

    def remove_read(self, name: str) -> None:
        """Remove the file once its launcher has read and emptied it."""
        path = self._find(name)
        if path is not None and path.exists() and path.stat().st_size == 0:
            self.remove(name)

    def remove(self, name: str) -> None:
        """Remove the file, read or not, whole or in part, and its place; harmless when there is none."""
        own = self._own / name
        for folder in [own, *self._private_folders()]:
            for file in _files_of(folder, name, own):
                file.unlink(missing_ok=True)
        if own.is_dir():
            unmount(own)  # a container that has the file keeps its own mount of it
            own.rmdir()
        with self._lock:
            self._placed.discard(name)

    def stands(self, name: str) -> bool:
        """Whether a file of this attempt, whole or in part, or a place made for one, is still there."""
        own = self._own / name
        files = (file for folder in self._private_folders() for file in _files_of(folder, name, own))
        return own.exists() or any(file.exists() for file in files)

    def sweep(self, held: Collection[str]) -> None:
        """Remove what stands for any other attempt than these, whichever life placed it.

        What this life placed stays until the second time: its attempt may have begun after `held` was asked.
        """
        with self._lock:
            keep = {*held, *(self._placed - self._unheld)}
            self._unheld = self._placed.difference(held)
        for place in _list(self._own):
            if place.name not in keep:
                log.info("secrets_removed", attempt=place.name)
                self.remove(place.name)
        kept_files = keep.union(map(_part_of, keep))
        for folder in self._private_folders():
            for file in _list(folder):
                if file.name not in kept_files:
                    log.info("secrets_removed", file=file.name)
                    file.unlink(missing_ok=True)
            if folder.name in self._former and not _list(folder):
                folder.rmdir()

    def _private_folders(self) -> Iterator[Path]:
        names = (self._private, *self._former)
        shared = (folder / name for folder in SHARED_FOLDERS for name in names)
        return (folder for folder in shared if folder.exists() and _is_fit(folder))

    def _find(self, name: str) -> Path | None:
        """Where the file of this attempt lies or is to lie, if a place was made, in this life or before."""
        own = self._own / name
        if own.is_dir() and find_mount(own) is not None:
            return own / FILE
        found = (folder / name for folder in self._private_folders() if (folder / name).exists())
        return next(found, None)

    def _make_place(self, name: str, size: int) -> Path:
        own = self._own / name
        try:
            self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
            own.mkdir(mode=0o700, exist_ok=True)
            mount_tmpfs(own, size=2 * size + SPARE_BYTES)  # a second call has two for a moment
            return own / FILE
        except OSError as error:
            log.info("no_tmpfs_of_its_own", path=str(own), cause=str(error))
            with contextlib.suppress(OSError):
                own.rmdir()
        for shared in SHARED_FOLDERS:
            folder = shared / self._private
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except OSError:
                continue  # not this user's to write
            if _is_fit(folder):
                return folder / name
        raise StepError(
            Reason.INTERNAL,
            "this runner has no place in memory for secrets: let it mount a tmpfs, or give it /dev/shm",
        )


def _private_of(runner: str) -> str:
    return f"buildmill-{runner}"


def _part_of(name: str) -> str:
    """While it is written; named after the attempt, so that any later life knows whose it is."""
    return f".{name}.part"


def _files_of(folder: Path, name: str, own: Path) -> tuple[Path, Path]:
    return folder / (FILE if folder == own else name), folder / _part_of(name)


def _list(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _is_fit(folder: Path) -> bool:
    return _is_ours(folder) and _is_in_memory(folder)


def _is_ours(folder: Path) -> bool:
    """A real folder that nobody but this user can look into."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return (
        stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and not stat.S_IMODE(found.st_mode) & 0o077
    )


def _is_in_memory(folder: Path) -> bool:
    place = folder.resolve()
    above = [mount for mount in list_mounts() if place.is_relative_to(mount.path)]
    if not above:
        return False  # in a changed root the file system below may not be listed
    return max(above, key=lambda mount: len(mount.path.parts)).kind in IN_MEMORY
