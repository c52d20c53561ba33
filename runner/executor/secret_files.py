"""The secrets of an attempt on their way into its step: a file in memory, which no disk ever sees.

The launcher reads it into the environment and empties it before the script begins; the runner removes it.
The engine knows its path alone, so what it shows of a container holds no value.
"""

import os
import secrets
import stat
from collections.abc import Mapping
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
    machine's own tmpfs.
    """

    def __init__(self, state: Path, runner: str) -> None:
        self._own = state / FOLDER
        self._private = f"buildmill-{runner}"

    def place(self, name: str, values: Mapping[str, str], *, for_any_user: bool) -> Path:
        """Write what the launcher of attempt `name` is to read; a second call writes it anew.

        The folder is closed to other users of the machine, so a step that runs as another user than root can
        be let read (and empty) its file.
        """
        text = "".join(f"export {key}={quote(value)}\n" for key, value in values.items()).encode()
        path = self._find(name) or self._make_place(name, len(text))
        part = path.with_name(f".{name}.{secrets.token_hex(8)}")
        try:
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
        """Remove the file, read or not; harmless when there is none."""
        path = self._find(name)
        if path is None:
            return
        path.unlink(missing_ok=True)
        if path.name == FILE:
            unmount(path.parent)  # a container that has the file keeps its own mount of it
            path.parent.rmdir()

    def stands(self, name: str) -> bool:
        """Whether a file of this attempt, or the place that was made for one, is still there."""
        return self._find(name) is not None

    def _find(self, name: str) -> Path | None:
        """Where the file of this attempt lies or is to lie, if a place was made, in this life or before."""
        own = self._own / name
        if own.is_dir() and find_mount(own) is not None:
            return own / FILE
        shared = (folder / self._private for folder in SHARED_FOLDERS)
        found = (folder for folder in shared if (folder / name).exists() and _is_fit(folder))
        return next((folder / name for folder in found), None)

    def _make_place(self, name: str, size: int) -> Path:
        own = self._own / name
        try:
            self._own.mkdir(mode=0o700, parents=True, exist_ok=True)
            own.mkdir(mode=0o700, exist_ok=True)
            mount_tmpfs(own, size=2 * size + SPARE_BYTES)  # a second call has two for a moment
            return own / FILE
        except OSError as error:
            log.info("no_tmpfs_of_its_own", path=str(own), cause=str(error))
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
    return max(above, key=lambda mount: len(mount.path.parts)).kind in IN_MEMORY
