"""How an operator's command reaches the runner of a state folder: a socket in that folder, one line each way.

Only the runner's own user and root are heard; the kernel says who is there. What is asked for here can also
be said by signals, which tell nothing back.
"""

import contextlib
import errno
import json
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

import structlog

from runner.errors import RunnerError

log = structlog.get_logger()

NAME: Final = "control"
MOST_BYTES: Final = 64 * 1024
MOST_TOLD: Final = 200
LINE_S: Final = 5.0
BACKLOG: Final = 16


class NobodyThere(RunnerError):
    """No runner uses this state folder."""


class NoAnswer(RunnerError):
    """A runner uses the folder and says nothing, or refuses to."""


class Word(StrEnum):
    """What a runner can be told."""

    STATUS = "status"
    DRAIN = "drain"
    HANDOVER = "handover"


@dataclass(frozen=True)
class Standing:
    """How the runner stands: the steps in its hands, each with its attempt and how far it is."""

    pid: int
    is_draining: bool
    running: tuple[str, ...]

    @property
    def sentence(self) -> str:
        count = len(self.running)
        return f"{count} step{'' if count == 1 else 's'} running"


@dataclass(frozen=True)
class Obedience:
    """What each word does, once its answer is out. `leave` ends the process."""

    standing: Callable[[], Standing]
    drain: Callable[[], None]
    leave: Callable[[], None]


class Control:
    """The runner's end. Who asks before `serve` waits for a moment."""

    def __init__(self, state: Path) -> None:
        with _reachable(state) as path:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()  # a killed runner's; the folder's lock is ours
            self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            os.fchmod(self._door.fileno(), stat.S_IRUSR | stat.S_IWUSR)  # before it has a name
            self._door.bind(str(path))
        self._door.listen(BACKLOG)

    def serve(self, obedience: Obedience) -> None:
        threading.Thread(target=self._serve, args=(obedience,), name="control", daemon=True).start()

    def close(self) -> None:
        """Nobody is heard any more; the name stays, and who asks is told that no runner is there."""
        with contextlib.suppress(OSError):
            self._door.shutdown(socket.SHUT_RDWR)
        self._door.close()

    def _serve(self, obedience: Obedience) -> None:
        while True:
            try:
                caller, _ = self._door.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return  # closed
                log.warning("control_not_accepted", cause=str(error))
                continue
            with caller:
                try:
                    self._answer(caller, obedience)
                except (OSError, ValueError) as error:
                    log.warning("control_not_answered", cause=str(error))

    def _answer(self, caller: socket.socket, obedience: Obedience) -> None:
        caller.settimeout(LINE_S)
        heard, uid = _receive(caller), _peer(caller)
        if uid not in (0, os.geteuid()):
            log.warning("control_refused", uid=uid)
            _send(caller, {"error": "only root and the runner's own user are heard"})
            return
        said = json.loads(heard)
        if not isinstance(said, dict):
            raise ValueError("what is said is no object")
        word = Word(str(said.get("do")))
        standing = obedience.standing()
        if word is Word.DRAIN:
            standing = replace(standing, is_draining=True)
        _send(caller, _written(standing))  # who has gone was told that nobody answers, and is not obeyed
        if word is Word.DRAIN:
            obedience.drain()
        elif word is Word.HANDOVER:
            caller.close()
            obedience.leave()


def ask(state: Path, word: Word, *, timeout_s: float) -> Standing:
    """Tell the runner of this folder something, and hear how it stands."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(timeout_s)
        try:
            with _reachable(state) as path:
                line.connect(str(path))
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError) as error:
            raise NobodyThere(f"no runner uses {state}") from error
        except TimeoutError as error:
            raise NoAnswer(f"the runner of {state} does not answer within {timeout_s:g} s") from error
        except OSError as error:
            raise NoAnswer(f"the runner of {state} cannot be asked: {error.strerror}") from error
        try:
            _send(line, {"do": str(word)})
            said = json.loads(_receive(line))
        except (ConnectionError, ValueError) as error:
            raise NoAnswer(f"the runner of {state} ended before it answered") from error
        except TimeoutError as error:
            raise NoAnswer(f"the runner of {state} does not answer within {timeout_s:g} s") from error
    if "error" in said:
        raise NoAnswer(f"the runner of {state} refuses: {said['error']}")
    return Standing(int(said["pid"]), bool(said["draining"]), tuple(str(one) for one in said["running"]))


@contextmanager
def _reachable(state: Path) -> Iterator[Path]:
    """The socket's path, by way of an open folder: the address of a socket may have 107 bytes only."""
    folder = os.open(state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Path(f"/proc/self/fd/{folder}/{NAME}")
    finally:
        os.close(folder)


def _peer(caller: socket.socket) -> int:
    """The user who is there, as the kernel says."""
    told = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    uid: int = struct.unpack("3i", told)[1]
    return uid


def _written(standing: Standing) -> dict[str, object]:
    return {
        "pid": standing.pid,
        "draining": standing.is_draining,
        "running": list(standing.running[:MOST_TOLD]),
    }


def _send(line: socket.socket, said: Mapping[str, object]) -> None:
    line.sendall(json.dumps(said).encode() + b"\n")


def _receive(line: socket.socket) -> bytes:
    """One line; what comes behind it is not read."""
    heard = b""
    while b"\n" not in heard:
        part = line.recv(4096)
        if not part:
            raise ConnectionResetError("the line ended early")
        heard += part
        if len(heard) > MOST_BYTES:
            raise ValueError("the line is too long")
    return heard.partition(b"\n")[0]
