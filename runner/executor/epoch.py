"""Notices that the container engine restarted, which looks like the user's own failure otherwise.

An engine that goes away terminates the steps, whose scripts then end as if someone had sent them TERM.
One stream of the engine's events stays open; its end is the sign. Beside it stands the engine's process,
written down with each attempt, so that a runner that was away itself can still tell.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from runner.errors import EngineUnavailable

FIRST_PAUSE_S: Final = 0.1
LONGEST_PAUSE_S: Final = 5.0
_PID_FILES: Final = (Path("/run/docker.pid"), Path("/var/run/docker.pid"))

_log = structlog.get_logger(__name__)


class Stream(Protocol):
    """An open stream of events; `close` ends the iteration from another thread."""

    def __iter__(self) -> Iterator[Any]: ...

    def close(self) -> None: ...


class EngineWatch:
    """Listens to the engine for as long as the runner lives."""

    def __init__(
        self,
        listen: Callable[[], AbstractContextManager[Stream]],
        *,
        came_back: Callable[[], None],
    ) -> None:
        self._listen = listen
        self._came_back = came_back
        self._breaks: list[float] = []
        self._state = threading.Condition()
        self._stream: Stream | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine-watch", daemon=True)
        self._thread.start()

    def has_broken_since(self, moment: float) -> bool:
        """Whether the stream broke at or after `moment` of the monotonic clock, or is away now."""
        with self._state:
            return self._stream is None or any(broken >= moment for broken in self._breaks)

    def wait_until_listening(self, timeout_s: float) -> bool:
        with self._state:
            return self._state.wait_for(lambda: self._stream is not None, timeout_s)

    def close(self) -> None:
        with self._state:
            self._closed = True
            self._state.notify_all()
            stream = self._stream
        if stream is not None:
            stream.close()
        self._thread.join(timeout=LONGEST_PAUSE_S)

    def _is_closed(self) -> bool:
        with self._state:
            return self._closed

    def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        was_away = False
        while not self._is_closed():
            try:
                with self._listen() as stream:
                    pause_s = FIRST_PAUSE_S
                    self._set_stream(stream)
                    if was_away:
                        self._came_back()
                    for _ in stream:
                        pass
            except EngineUnavailable as error:
                _log.info("the engine does not answer", error=str(error), pause_s=pause_s)
            if self._is_closed():
                return
            was_away = True
            self._set_stream(None)
            with self._state:
                self._state.wait_for(lambda: self._closed, pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    def _set_stream(self, stream: Stream | None) -> None:
        with self._state:
            if stream is None:
                self._breaks = [*self._breaks[-99:], time.monotonic()]
            self._stream = stream
            if self._closed and stream is not None:
                stream.close()
            self._state.notify_all()


def find_engine_process(socket_path: str | None) -> str | None:
    """Names the engine's very process (its id and when it began); None where that cannot be seen."""
    pid = _peer_of(socket_path) if socket_path else None
    if pid is None or pid <= 1:  # a service manager may have opened the socket in the engine's name
        pid = _recorded_pid()
    if pid is None:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return f"{pid} {fields[19]}"


def _peer_of(socket_path: str) -> int | None:
    size = struct.calcsize("3i")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(5)
            line.connect(socket_path)
            pid, _, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    except OSError:
        return None
    return int(pid)


def _recorded_pid() -> int | None:
    for path in _PID_FILES:
        try:
            pid = int(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if Path(f"/proc/{pid}").exists():
            return pid
    return None
