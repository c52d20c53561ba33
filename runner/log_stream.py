"""The log of one attempt as the coordinator gets it: masked, with offsets that never change.

The container only appends bytes to a file. This reads behind it and masks, and can begin anew anywhere:
the masked stream is a pure function of the file, so a chunk that has to be sent again comes out byte for
byte as before, in this life of the runner or the next. Checkpoints keep that from starting at zero.

The step can reach the file, so nothing in it is believed. Where it has shrunk, changed or gone, what it held
is lost; the stream says so in a line at that very place and goes on with what comes after.
"""

import hashlib
import json
import os
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from runner.durable import no_room_ends_the_step, write_all, write_whole
from runner.inotify import Inotify
from runner.mask import Masker

log = structlog.get_logger()

READ_BYTES = 256 * 1024
CHECKPOINT_BYTES = 256 * 1024
MOST_CHECKPOINTS = 64
DISCARD_BYTES = 8 * 1024 * 1024
LONGEST_NOTE = 4096
DISCARD_S = 0.25
POLL_S = 1.0

Level = Literal["INFO", "WARN", "ERROR"]
PREFIXES: dict[Level, str] = {
    "INFO": "[buildmill] ",
    "WARN": "[buildmill] warning: ",
    "ERROR": "[buildmill] error: ",
}
WITNESS_BYTES = 64  # so many bytes that were read are looked at again, to see that the file is still that one


@dataclass(frozen=True)
class Identity:
    """Which file it was, for a later life of the runner."""

    device: int
    inode: int


@dataclass(frozen=True)
class Chunk:
    """Masked bytes and where they stand in the masked stream."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class Total:
    """The whole masked stream; without a digest where parts of it can no longer be read."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Checkpoint:
    """A place where a fresh masker goes on exactly as the one before."""

    raw: int
    masked: int


class LogStream:
    """Reads one log; a single thread reads, any thread may add notes.

    `identity` is what a former life wrote down: another file under this name is not read.
    `checkpoints` is a file of ours beside the log, never one the step can reach.
    """

    def __init__(
        self,
        path: Path,
        masker: Masker,
        *,
        identity: Identity | None = None,
        checkpoints: Path | None = None,
    ) -> None:
        self._saved = checkpoints
        self._masker = masker.fresh()
        self._note_lock = threading.Lock()
        self._lost = False
        self._start = Checkpoint(0, 0)
        self._gap = b""  # the line that stands at the start when what came before it cannot be read any more
        self._witness = b""  # what stands right before the place up to which the file has been read
        self._seen = 0  # how large the file has been
        self._ends_a_line = True  # what has been made
        self._checkpoints: list[Checkpoint] = []
        self._spacing = CHECKPOINT_BYTES
        self._stopped: Total | None = None
        self._finished = False
        self._flushed = False
        self._raw = 0  # so far the file has been read
        self._made = 0  # so far the masked stream has been made
        self._made_ahead = b""  # its end, not yet given out
        self._from = 0  # what stands before this is not given out again
        self._digest = hashlib.sha256()
        self._digested = 0
        self._fd, self._writer = -1, -1
        is_same = self._open(path, identity)
        self._inotify = Inotify(self._fd)
        self._load_checkpoints()
        if not is_same:
            self._lose()

    @property
    def identity(self) -> Identity:
        return _identity(os.fstat(self._fd))

    @property
    def written(self) -> int:
        """The size of the file right now, read or not: any change of it means that something was printed.

        Whoever looks often lets the log tell how much is missing when the file is cut.
        """
        size = os.fstat(self._fd).st_size
        self._seen = max(self._seen, size)
        return size

    @property
    def waiting(self) -> int:
        """How many bytes are there to be given out, before they are masked."""
        return max(0, self.written - self._raw) + len(self._made_ahead)

    @property
    def is_lost(self) -> bool:
        """True when a part of the log can no longer be read."""
        return self._lost

    @property
    def size(self) -> int:
        """How much of the masked stream was given out; after `finish` and the last `read`, all of it."""
        return max(self._made - len(self._made_ahead), self._from)

    @property
    def is_at_end(self) -> bool:
        """True when `finish` or `stop` was called and nothing is left to be read."""
        return self._stopped is not None or (self._flushed and not self._made_ahead)

    def read(self, max_bytes: int = 1024 * 1024) -> Chunk | None:
        """The next masked bytes, or None when there are none now."""
        if self._stopped:
            return None
        while len(self._made_ahead) < max_bytes and self._make_more(max_bytes):
            pass
        if not self._made_ahead:
            return None
        offset = self.size
        data, self._made_ahead = self._made_ahead[:max_bytes], self._made_ahead[max_bytes:]
        return Chunk(offset, data)

    def rewind(self, offset: int) -> None:
        """Go on at `offset` of the masked stream, because that is where the coordinator's log ends."""
        if offset < self._start.masked:
            # What stood there was given out once and cannot be read again.
            missing = self._start.masked - offset
            self._begin_anew(self._start.raw, offset, missing=missing, ends_a_line=not offset)
            self._go_to(self._start, offset)
            return
        start = self._start
        self._go_to([place for place in (start, *self._checkpoints) if place.masked <= offset][-1], offset)
        while self._made < offset and self._start is start and self._make_more(READ_BYTES):
            pass
        if self._start is start and self._made + self._masker.hold_back >= offset:
            return
        self._begin_anew(0, offset, missing=0, ends_a_line=not offset)  # it has been cut between two lives
        self._go_to(self._start, offset)

    def finish(self) -> None:
        """Nobody writes any more: what was held back may go out, too."""
        self._finished = True
        self._inotify.wake()

    def total(self) -> Total:
        """Size and digest of the whole stream; only after `finish` (and all was read) or `stop`."""
        if self._stopped:
            return self._stopped
        if not self.is_at_end:
            raise ValueError("the log has not been read to its end")
        if self._lost:
            return Total(self.size, None)
        if self._digested == self.size:
            return Total(self.size, self._digest.hexdigest())
        return Total(self.size, self._digest_again(self.size))

    def stop(self, size: int) -> None:
        """End the stream at `size`: the coordinator takes no more. What follows is thrown away."""
        if self._stopped is None:
            self._stopped = Total(size, None if self._lost else self._digest_again(size))
            self._made_ahead = b""
            self._save_checkpoints()
        self.discard_rest()

    def discard_rest(self) -> None:
        """After `stop`: give back the disk whenever the file has grown large; the writer appends anyway."""
        if self._stopped and os.fstat(self._fd).st_size > DISCARD_BYTES:
            os.ftruncate(self._writer, 0)

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is more to read, at most `timeout_s`; False when there is not."""
        deadline = time.monotonic() + timeout_s
        while True:
            if not self._stopped and self._has_more():
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._stopped:
                self.discard_rest()
                time.sleep(min(left, DISCARD_S))  # a step that floods its log must not wake us each time
            else:
                self._inotify.wait(min(left, POLL_S))

    def note(self, line: str, level: Level = "INFO") -> None:
        """Add a line of our own to the log."""
        if self._finished:
            raise ValueError("the log is closed: its size has been told")
        text = (PREFIXES[level] + _one_line(line)).encode() + b"\n"
        with self._note_lock:
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) not in (b"\n", b""):
                text = b"\n" + text
            with no_room_ends_the_step("the log cannot be written"):
                write_all(self._writer, text)

    def close(self) -> None:
        """Harmless twice; who reads on afterwards gets an error and never another file."""
        self._inotify.close()
        fds, self._fd, self._writer = (self._fd, self._writer), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    # Making the masked stream

    def _make_more(self, at_most: int) -> bool:
        """Read and mask a piece; False when nothing is left for now."""
        size = os.fstat(self._fd).st_size
        known = len(self._witness)
        read = os.pread(self._fd, known + min(READ_BYTES, max(at_most, 1)), self._raw - known)
        if size < self._raw or read[:known] != self._witness:
            self._lose()
            return True
        self._seen = max(self._seen, size)
        piece = read[known:]
        if piece:
            self._raw += len(piece)
            self._witness = read[-WITNESS_BYTES:]
            self._append(self._masker.feed(piece))
            self._consider_checkpoint()
            return True
        if self._finished and not self._flushed:
            self._flushed = True
            self._append(self._masker.finish())
            return True
        return False

    def _append(self, masked: bytes) -> None:
        if not masked:
            return
        news = self._made + len(masked) - self._digested
        if 0 < news <= len(masked):
            self._digest.update(masked[-news:] if news < len(masked) else masked)
            self._digested += news
        known = max(0, self._from - self._made)
        self._made += len(masked)
        self._made_ahead += masked[known:]
        self._ends_a_line = masked.endswith(b"\n")

    def _has_more(self) -> bool:
        size = os.fstat(self._fd).st_size
        self._seen = max(self._seen, size)
        return bool(self._made_ahead) or size != self._raw or (self._finished and not self._flushed)

    def _go_to(self, place: Checkpoint, offset: int) -> None:
        """Read on from a checkpoint; nothing before `offset` is given out again."""
        self._masker = self._masker.fresh()
        self._raw, self._made, self._from, self._made_ahead = place.raw, place.masked, offset, b""
        self._witness, self._flushed, self._ends_a_line = b"", False, place.masked == 0
        if place == self._start:
            self._append(self._gap)

    def _digest_again(self, size: int) -> str | None:
        """Mask the file from its beginning up to `size` once more; None where it has too little."""
        digest = hashlib.sha256()
        masker = self._masker.fresh()
        raw, left = 0, size
        while left > 0:
            piece = os.pread(self._fd, READ_BYTES, raw)
            raw += len(piece)
            masked = masker.feed(piece) if piece else masker.finish()
            digest.update(masked[:left])
            left -= min(left, len(masked))
            if not piece:
                break
        return digest.hexdigest() if left == 0 else None

    # What survives

    def _open(self, path: Path, identity: Identity | None) -> bool:
        """Open the log; False, with an empty file in its place, when it is not the one it was."""
        flags = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_APPEND
        try:
            self._fd = os.open(path, os.O_RDWR | flags)
            status = os.fstat(self._fd)
            if stat.S_ISREG(status.st_mode) and identity in (None, _identity(status)):
                self._writer = os.dup(self._fd)
                return True
            os.close(self._fd)
        except OSError as error:
            log.warning("log_unreadable", path=str(path), error=str(error))
        rest = path.with_name(f"{path.name}.rest")
        self._fd = os.open(rest, os.O_RDWR | os.O_CREAT | flags, 0o600)
        self._writer = os.dup(self._fd)
        return False

    def _lose(self) -> None:
        """Go on with what the file holds now, behind all that was made of what it held before."""
        missing = max(0, self._seen - self._raw) + self._masker.hold_back
        self._begin_anew(0, self._made, missing=missing, ends_a_line=self._ends_a_line)
        self._masker = self._masker.fresh()
        self._raw, self._seen, self._witness, self._flushed = 0, 0, b"", False
        self._append(self._gap)

    def _begin_anew(self, raw: int, masked: int, *, missing: int, ends_a_line: bool) -> None:
        """What stood before `masked` is gone for good: the stream begins there, with a line that says so."""
        log.warning("log_lost", behind=masked, missing=missing)
        self._lost = True
        self._gap = (b"" if ends_a_line else b"\n") + gap_line(masked, missing)
        self._start = Checkpoint(raw, masked)
        self._checkpoints = []
        self._save_checkpoints()

    def _consider_checkpoint(self) -> None:
        last = self._checkpoints[-1] if self._checkpoints else self._start
        if not self._masker.at_rest or self._raw < last.raw + self._spacing:
            return
        self._checkpoints.append(Checkpoint(self._raw, self._made))
        if len(self._checkpoints) > MOST_CHECKPOINTS:
            self._checkpoints = self._checkpoints[1::2]
            self._spacing *= 2
        self._save_checkpoints()

    def _save_checkpoints(self) -> None:
        if self._saved is None:
            return
        stopped = {"size": self._stopped.size, "sha256": self._stopped.sha256} if self._stopped else None
        content = {
            "start": [self._start.raw, self._start.masked],
            "checkpoints": [[place.raw, place.masked] for place in self._checkpoints],
            "lost": self._lost,
            "gap": self._gap.decode(),
            "stopped": stopped,
        }
        try:
            # Older checkpoints are as true as newer ones, so a loss of power does no harm.
            write_whole(self._saved, json.dumps(content).encode(), durable=stopped is not None)
        except OSError as error:
            log.warning("checkpoints_not_saved", path=str(self._saved), error=str(error))

    def _load_checkpoints(self) -> None:
        if self._saved is None:
            return
        try:
            content = json.loads(self._saved.read_bytes())
            self._start = Checkpoint(*map(int, content["start"]))
            self._checkpoints = [Checkpoint(int(raw), int(masked)) for raw, masked in content["checkpoints"]]
            self._lost = bool(content["lost"])
            self._gap = str(content.get("gap", "")).encode()
            stopped = content["stopped"]
            self._stopped = Total(int(stopped["size"]), stopped["sha256"]) if stopped else None
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError) as error:
            log.warning("checkpoints_unreadable", path=str(self._saved), error=str(error))
            self._start, self._checkpoints, self._gap = Checkpoint(0, 0), [], b""
        self._go_to(self._start, self._start.masked)


def gap_line(behind: int, missing: int) -> bytes:
    """What a log says where bytes are missing: at which offset, and how many as far as that is known."""
    count = f"at least {missing} bytes are" if missing else "bytes are"
    said = f"{count} missing here, behind byte {behind} of this log: its file was cut or replaced"
    return (PREFIXES["WARN"] + said).encode() + b"\n"


def _identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino)


def _one_line(text: str) -> str:
    """One line without anything that moves a cursor or forges another line."""
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text[:LONGEST_NOTE]
    )
    return shown if len(text) <= LONGEST_NOTE else f"{shown}..."
