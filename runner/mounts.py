"""The only file that calls mount(2) and umount2(2), and that reads the kernel's list of mounts."""

import ctypes
import errno
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
BUSY_TRIES = 25
BUSY_PAUSE_S = 0.02
MAX_STACKED_MOUNTS = 16


@dataclass(frozen=True)
class MountPoint:
    """One line of the kernel's list: where, which kind, and the options its maker gave."""

    path: Path
    kind: str
    options: tuple[str, ...]

    def option(self, name: str) -> str:
        """The value of `name=value`, or nothing."""
        return next((text[len(name) + 1 :] for text in self.options if text.startswith(f"{name}=")), "")


def mount_overlay(target: Path, options: str, *, read_only: bool = False) -> None:
    """Mount an overlay that gives nobody rights by setuid bits or device files."""
    flags = MS_NOSUID | MS_NODEV | (MS_RDONLY if read_only else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"overlay", os.fsencode(target), b"overlay", ctypes.c_ulong(flags), options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot mount an overlay: {os.strerror(number)}", str(target))


def mount_tmpfs(target: Path, *, size: int) -> None:
    """Mount a file system in memory that only this user can look into."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = ctypes.c_ulong(MS_NOSUID | MS_NODEV | MS_NOEXEC)
    options = f"size={size},mode=0700".encode()
    if libc.mount(b"tmpfs", os.fsencode(target), b"tmpfs", flags, options):
        number = ctypes.get_errno()
        raise OSError(number, f"cannot mount a tmpfs: {os.strerror(number)}", str(target))


def unmount(target: Path) -> None:
    """Take every mount off `target`: at once, or lazily where something still holds it open."""
    for _ in range(MAX_STACKED_MOUNTS):
        if find_mount(target) is None:
            return
        _unmount_one(target)
    raise OSError(errno.EBUSY, "too many mounts on top of each other", str(target))


def find_mount(target: Path) -> MountPoint | None:
    """What is mounted exactly at `target`; the topmost where there are several."""
    wanted = target.resolve()
    found = [mount for mount in list_mounts() if mount.path == wanted]
    return found[-1] if found else None


def mounts_below(folder: Path) -> list[Path]:
    """Every mount point at or below `folder`, innermost first."""
    root = folder.resolve()
    inside = [mount.path for mount in list_mounts() if mount.path.is_relative_to(root)]
    return inside[::-1]


def overlays_of(folder: Path) -> list[Path]:
    """The overlays below `folder` that are made of folders below it, innermost first."""
    root = folder.resolve()
    inside = [mount for mount in list_mounts() if mount.path.is_relative_to(root) and mount.kind == "overlay"]
    return [mount.path for mount in inside if _is_made_of(mount, root)][::-1]


def _is_made_of(mount: MountPoint, root: Path) -> bool:
    upper = mount.option("upperdir")
    parts = [upper] if upper else mount.option("lowerdir").split(":")
    return all(Path(part).is_relative_to(root) for part in parts)


def list_mounts() -> list[MountPoint]:
    """The mounts that this process sees, oldest first."""
    lines = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [_read_line(line) for line in lines]


def _read_line(line: str) -> MountPoint:
    head, _, tail = line.partition(" - ")
    kind, _, options = tail.split(" ", 2)
    return MountPoint(Path(_unescape(head.split(" ")[4])), kind, tuple(_unescape(options).split(",")))


def _unescape(text: str) -> str:
    """Undo the kernel's octal escapes of blanks and backslashes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _unmount_one(target: Path) -> None:
    for _ in range(BUSY_TRIES):
        if _umount2(target, UMOUNT_NOFOLLOW) != errno.EBUSY:
            return
        time.sleep(BUSY_PAUSE_S)  # the kernel has no event for "no longer busy"
    _umount2(target, UMOUNT_NOFOLLOW | MNT_DETACH)


def _umount2(target: Path, flags: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(target), ctypes.c_int(flags)) == 0:
        return 0
    number = ctypes.get_errno()
    if number in (errno.EBUSY, errno.EINVAL, errno.ENOENT):
        return number  # busy is retried; the others mean that nothing is mounted there any more
    raise OSError(number, f"cannot unmount: {os.strerror(number)}", str(target))
