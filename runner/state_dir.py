"""The runner's own folder: one process at a time, its identity, and the request it waits on."""

import fcntl
import json
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from runner.durable import write_all, write_whole
from runner.errors import BadSetup

log = structlog.get_logger()

MOST_BYTES = 64 * 1024
MOST_IDS = 100
IDS = "runner-ids.json"


class FolderInUse(BadSetup):
    """Another process of this or another runner works in the folder."""


class StateLock:
    """Held for as long as a runner uses the folder; the kernel gives it back when the runner dies."""

    def __init__(self, state: Path) -> None:
        _refuse_below_another(state)
        try:
            state.mkdir(mode=0o711, parents=True, exist_ok=True)  # git, as another user, passes through
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(state / "lock", flags, 0o600)
        except OSError as error:
            raise BadSetup(f"the state folder {state} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._fd, 20, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            raise FolderInUse(
                f"another runner (process {holder or '?'}) uses {state}: stop it or name another --state"
            ) from error
        os.ftruncate(self._fd, 0)
        write_all(self._fd, b"%d\n" % os.getpid())

    def release(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _refuse_below_another(state: Path) -> None:
    """Two runners, one in the folder of the other, would clean up after each other."""
    for above in state.resolve().parents:
        try:
            if (above / "identity.json").exists() and _is_locked(above / "lock"):
                raise BadSetup(f"{state} lies below {above}, which another runner uses: name another --state")
        except PermissionError:
            continue  # nor could we do anything to it


def _is_locked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@dataclass(frozen=True)
class Identity:
    """Who this runner is, to which coordinator.

    `next_secret` is of its own making; the coordinator may have been told of it, and it is not used yet.
    """

    runner_id: str
    secret: str = field(repr=False)
    coordinator: str
    next_secret: str = field(default="", repr=False)


def save_identity(state: Path, identity: Identity) -> None:
    """Its id is remembered for good: what runs under it is found again when the identity has gone."""
    others = [one for one in former_ids(state) if one != identity.runner_id]
    ids = [*others, identity.runner_id][-MOST_IDS:]
    noted = {"folder": state.stat().st_ino, "ids": ids}
    write_whole(state / IDS, json.dumps(noted).encode())
    content = {
        "runnerId": identity.runner_id,
        "secret": identity.secret,
        "coordinator": identity.coordinator,
        **({"nextSecret": identity.next_secret} if identity.next_secret else {}),
    }
    write_whole(state / "identity.json", json.dumps(content).encode(), mode=0o600)


def former_ids(state: Path) -> list[str]:
    """Every id under which a runner was registered in this folder, this one's included.

    A copy of the folder has none: what runs under the ids of the original is not the copy's to end.
    """
    path = state / IDS
    try:
        with path.open("rb") as file:
            noted = json.loads(file.read(MOST_BYTES))
        ids = [str(one) for one in noted["ids"]]
        return ids if noted["folder"] == state.stat().st_ino else []
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        log.warning("former_ids_unreadable", path=str(path), error=str(error))
        return []


def load_identity(state: Path) -> Identity | None:
    """The identity of a former life, or None where there was none."""
    path = state / "identity.json"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise BadSetup(f"{path} cannot be read: {error.strerror}") from error
    try:
        mode = stat.S_IMODE(os.fstat(fd).st_mode)
        content = os.read(fd, MOST_BYTES)
    finally:
        os.close(fd)
    if mode & 0o077:
        raise BadSetup(f"{path} holds a secret that others may read: chmod 600 {path}")
    try:
        told = json.loads(content)
        texts = [told[name] for name in ("runnerId", "secret", "coordinator")]
        following = told.get("nextSecret", "")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadSetup(f"{path} is damaged: remove it to register this runner anew") from error
    if not all(isinstance(text, str) and text for text in texts) or not isinstance(following, str):
        raise BadSetup(f"{path} is damaged: remove it to register this runner anew")
    runner_id, secret, coordinator = texts
    return Identity(runner_id, secret, coordinator, following)


class PendingRequest:
    """The id under which steps were asked for and no answer has been understood yet.

    Asking again under the same id, even in another life, gets the same steps and no others.
    """

    def __init__(self, state: Path) -> None:
        self._path = state / "requests.json"

    def current(self, new_id: str) -> str:
        """The pending id, or `new_id`, which is then pending; OSError when it cannot be written down."""
        pending = self.find()
        if pending is None:
            write_whole(self._path, json.dumps({"requestId": new_id}).encode())
            return new_id
        return pending

    def find(self) -> str | None:
        try:
            with self._path.open("rb") as file:
                pending = json.loads(file.read(MOST_BYTES))["requestId"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("request_unreadable", path=str(self._path), error=str(error))
            return None
        return pending if isinstance(pending, str) and pending else None

    def answered(self) -> None:
        """The answer is understood and journaled: the next request gets an id of its own."""
        self._path.unlink(missing_ok=True)
