"""Opens files below a folder without ever leaving it: no symbolic link is followed, no mount crossed.

The kernel decides this in one call where it can (openat2, since Linux 5.6). Elsewhere every component is
opened by itself, refusing links.
"""

import ctypes
import errno
import os

SYS_OPENAT2 = 437  # the same number on every architecture
NO_XDEV, NO_MAGICLINKS, NO_SYMLINKS, BENEATH = 0x01, 0x02, 0x04, 0x08
RESOLVE = NO_XDEV | NO_MAGICLINKS | NO_SYMLINKS | BENEATH
TRIES_IN_A_RACE = 32

_libc = ctypes.CDLL(None, use_errno=True)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def open_folder(root: int, path: str) -> int:
    """A descriptor of the folder `path` below `root`, for walking."""
    return open_below(root, path, os.O_RDONLY | os.O_DIRECTORY)


def open_content(root: int, path: str) -> int:
    """A descriptor of whatever stands at `path`; opening never blocks and leaves no trace where allowed.

    The caller looks at the descriptor to learn what it got.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
    try:
        return open_below(root, path, flags | os.O_NOATIME)
    except PermissionError:  # only the owner may leave the access time alone
        return open_below(root, path, flags)


def open_below(root: int, path: str, flags: int) -> int:
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC
    if _HAS_OPENAT2:
        return _openat2(root, path, flags)
    return _open_by_component(root, path, flags)


def _openat2(root: int, path: str, flags: int) -> int:
    how = _OpenHow(flags, 0, RESOLVE)
    name = os.fsencode(path)
    if b"\0" in name:
        raise ValueError("a path cannot hold a zero byte")
    for _ in range(TRIES_IN_A_RACE):
        fd = _libc.syscall(
            ctypes.c_long(SYS_OPENAT2),
            ctypes.c_int(root),
            ctypes.c_char_p(name),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return int(fd)
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR):  # EAGAIN: something was renamed meanwhile
            raise OSError(number, os.strerror(number), path)
    raise OSError(errno.EAGAIN, "the path changed again and again", path)


def _open_by_component(root: int, path: str, flags: int) -> int:
    *folders, last = path.split("/")
    if any(name in ("", "..") for name in (*folders, last)):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)
    device = os.fstat(root).st_dev
    at = os.dup(root)
    try:
        for name in folders:
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
            _refuse_other_device(at, device, path)
        fd = os.open(last, flags, dir_fd=at)
        if flags & os.O_DIRECTORY:
            try:
                _refuse_other_device(fd, device, path)
            except OSError:
                os.close(fd)
                raise
        return fd
    finally:
        os.close(at)


def _refuse_other_device(fd: int, device: int, path: str) -> None:
    if os.fstat(fd).st_dev != device:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), path)


def _probe_openat2() -> bool:
    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.close(_openat2(here, ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        return False  # an older kernel (ENOSYS), or a filter that forbids the call (EPERM)
    finally:
        os.close(here)
    return True


_HAS_OPENAT2 = _probe_openat2()
