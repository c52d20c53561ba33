"""Waits until a file changes, by the kernel's word where it gives one."""

import ctypes
import os
import select
from types import TracebackType
from typing import Self

MODIFY, ATTRIB, CLOSE_WRITE = 0x2, 0x4, 0x8
EVENT_BYTES = 64 * 1024

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Watches files by their open descriptors, so that no name can be exchanged in between.

    Where the kernel has no watches left, `wait` only waits: callers look for themselves afterwards anyway.
    """

    def __init__(self, *fds: int) -> None:
        self._fd = int(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        for fd in fds:
            self.add(fd)

    def add(self, fd: int) -> bool:
        """Watch one more file; False when the kernel refuses."""
        if self._fd < 0:
            return False
        path = f"/proc/self/fd/{fd}".encode()
        return int(_libc.inotify_add_watch(self._fd, path, MODIFY | ATTRIB | CLOSE_WRITE)) >= 0

    def wait(self, timeout_s: float) -> bool:
        """Wait for a change or a `wake` since the last call, at most `timeout_s`; False when none came."""
        watched = [self._wake, self._fd] if self._fd >= 0 else [self._wake]
        poll = select.poll()
        for fd in watched:
            poll.register(fd, select.POLLIN)
        told = poll.poll(max(0, timeout_s) * 1000)
        for fd, _ in told:
            self._drain(fd)
        return bool(told)

    def wake(self) -> None:
        """End the wait of another thread, or the next one."""
        os.eventfd_write(self._wake, 1)

    def _drain(self, fd: int) -> None:
        """Forget what was told; one full buffer is enough, the rest is told again."""
        try:
            os.read(fd, EVENT_BYTES)
        except BlockingIOError:
            pass  # another thread was quicker

    def close(self) -> None:
        for fd in (self._fd, self._wake):
            if fd >= 0:
                os.close(fd)
        self._fd = self._wake = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
