"""The secrets of an attempt on their way into its step: a file in memory, which no disk ever sees.

The launcher reads it into the environment and empties it before the script begins; the runner removes it.
The engine knows its path alone, so what it shows of a container holds no value.
"""

import os
import secrets
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import structlog

from runner.errors import StepError
from runner.mounts import find_mount, list_mounts, mount_tmpfs, unmount
from shared.reasons import Reason
from shared.script import quote

FOLDER: Final = "secrets"
MOST_BYTES: Final = 256 * 1024 * 1024
IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
SHARED_FOLDERS: Final = (Path("/dev/shm"), Path("/run"))  # noqa: S108 - only a private folder in them is used

log = structlog.get_logger()


class SecretFiles:
    """The files of one runner; any number of threads may use it.

    They lie on a tmpfs of the runner's own below its state folder, or, where it may not mount one, in a
    private folder on the machine's.
    """

    def __init__(self, state: Path, runner: str) -> None:
        self._own = state / FOLDER
        self._private = f"buildmill-{runner}"
        self._lock = threading.Lock()

    def place(self, name: str, values: Mapping[str, str], *, for_any_user: bool) -> Path:
        """Write what the launcher of attempt `name` is to read; a second call writes it anew.

        The folder is closed to other users of the machine, so a step that runs as another user than root can
        be let read (and empty) its file.
        """
        with self._lock:
            folder = self._find_folder() or self._make_folder()
        text = "".join(f"export {key}={quote(value)}\n" for key, value in values.items())
        part = folder / f".{name}.{secrets.token_hex(8)}"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode())
                os.fchmod(descriptor, 0o666 if for_any_user else 0o600)
            part.rename(folder / name)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise StepError(
                Reason.INTERNAL, f"the secrets cannot be put into memory: {error.strerror}"
            ) from error
        return folder / name

    def remove_read(self, name: str) -> None:
        """Remove the file once its launcher has read and emptied it."""
        folder = self._find_folder()
        try:
            if folder is not None and (folder / name).stat().st_size == 0:
                (folder / name).unlink()
        except FileNotFoundError:
            return

    def remove(self, name: str) -> None:
        """Remove the file, read or not; harmless when there is none."""
        folder = self._find_folder()
        if folder is not None:
            (folder / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Give the memory back when no attempt waits for its file."""
        mounted = find_mount(self._own)
        if mounted is not None and mounted.kind == "tmpfs" and not any(self._own.iterdir()):
            unmount(self._own)

    def _find_folder(self) -> Path | None:
        """The folder that is there already, made by us or by a former life."""
        mounted = find_mount(self._own)
        if mounted is not None and mounted.kind == "tmpfs":
            return self._own
        found = (shared / self._private for shared in SHARED_FOLDERS)
        return next((folder for folder in found if _is_ours(folder) and _is_in_memory(folder)), None)

    def _make_folder(self) -> Path:
        self._own.mkdir(mode=0o700, exist_ok=True)
        try:
            mount_tmpfs(self._own, size=MOST_BYTES)
            return self._own
        except OSError as error:
            log.info("no_tmpfs_of_its_own", path=str(self._own), cause=str(error))
        for shared in SHARED_FOLDERS:
            folder = shared / self._private
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
            except OSError:
                continue  # not this user's to write
            if _is_ours(folder) and _is_in_memory(folder):
                return folder
        raise StepError(
            Reason.INTERNAL,
            "this runner has no place in memory for secrets: let it mount a tmpfs, or give it /dev/shm",
        )


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
