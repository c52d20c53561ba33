"""Reads the log of a build as messages, from any position on: nothing twice, nothing left out.

Where a reader begins in the middle, it looks back in each step's log for the line that stood open there; what
it keeps besides is the open line of each step, which is never longer than a message.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from coordinator.actions.read_build_log import Piece, Standing, list_standings, read_build_log
from coordinator.api.state import AppState
from coordinator.rules.log_lines import BEGINNING, Line, LineCutter, Position, behind
from coordinator.site import Site
from coordinator.store.log_files import LogFiles
from coordinator.store.logs import OF_BUILD

# (action, *args, **named): runs it on a snapshot of the database
Read = Callable[..., Awaitable[Any]]

BYTES_AT_ONCE = 64 * 1024
HANDED_AT_ONCE = 64 * 1024


@dataclass(frozen=True)
class Message:
    """One message: its position, the piece that names step, attempt and container, and when it was whole."""

    position: Position
    piece: Piece
    at: datetime
    line: Line


@dataclass(frozen=True)
class Batch:
    """Some messages as they are sent; `is_waiting`: no more for now, `is_end`: no more ever."""

    messages: list[tuple[Position, bytes]]
    is_waiting: bool = False
    is_end: bool = False


def read_for_all(state: AppState) -> Read:
    """The way to what several callers will get, each of which was asked before whether it may."""

    async def read(action: Callable[..., Any], *args: Any, **named: Any) -> Any:
        return await state.lanes.read(lambda tx: action(tx, *args, **named))

    return read


class _Writer:
    """What one attempt of a step has written as far as it was read."""

    def __init__(self, last: Piece, end: int = 0) -> None:
        self.last = last
        self.end = end
        self.cutter = LineCutter()


class LogReader:
    """One reader of one log; `position` is behind everything that it has handed out."""

    def __init__(
        self,
        site: Site,
        read: Read,
        build_id: str,
        encode: Callable[[Message], bytes],
        start: Position = BEGINNING,
    ) -> None:
        self._site = site
        self._look = read
        self._build_id = build_id
        self._encode = encode
        self.position = start
        self._pieces: Iterator[tuple[Position, bytes]] | None = None
        self._writers: dict[str, _Writer] | None = None
        # the last piece that was read to its end, and how many messages the one behind it has had so far
        self._behind = start.piece if start >= behind(start.piece) else start.piece - 1
        self._number = 0
        self._is_missing = False

    async def read(self) -> Batch:
        """What comes next, a bounded amount of it."""
        if self._writers is None:
            self._writers = await self._look_back()
        if self._pieces is None:
            found = await self._look(read_build_log, self._site, self._build_id, after=self._behind)
            if not found.found:
                messages = list(self._hand_out(self._end_all(self._writers))) if found.is_end else []
                return Batch(messages, is_waiting=not found.is_end, is_end=found.is_end)
            self._is_missing = False
            self._pieces = self._hand_out(self._read(found.found, self._writers))
        messages, was_all = await asyncio.to_thread(_take, self._pieces)
        if was_all:
            self._pieces = None
        return Batch(messages, is_waiting=was_all and self._is_missing)

    # Where a reader begins

    async def _look_back(self) -> dict[str, _Writer]:
        standings = await self._look(list_standings, self._site, self._build_id, before=self._behind + 1)
        return await asyncio.to_thread(self._restore, standings)

    def _restore(self, standings: list[Standing]) -> dict[str, _Writer]:
        files = self._site.logs
        writers = {}
        for standing in standings:
            writer = writers[standing.last.step_id] = _Writer(standing.last, standing.end)
            at = _start_of_line(files, standing)
            while at < standing.end:
                data = files.read(standing.last.path, at, min(BYTES_AT_ONCE, standing.end - at))
                if not data:
                    break
                for _ in writer.cutter.cut(data):
                    pass  # was handed out before
                at += len(data)
        return writers

    # How it goes on

    def _read(self, pieces: Sequence[Piece], writers: dict[str, _Writer]) -> Iterator[Message]:
        """The messages of these pieces, until bytes are missing that were there before."""
        for piece in pieces:
            if piece.length == 0:
                yield from self._end_at(piece, writers)
            else:
                yield from self._begin(piece, writers)
                yield from self._cut(piece, writers[piece.step_id])
            if self._is_missing:
                return
            self._behind, self._number = piece.number, 0
            self.position = max(self.position, behind(piece.number))

    def _begin(self, piece: Piece, writers: dict[str, _Writer]) -> Iterator[Message]:
        """Another attempt of a step ends what the one before it has left open."""
        writer = writers.get(piece.step_id)
        if writer is not None and writer.last.attempt == piece.attempt:
            return
        writers[piece.step_id] = _Writer(piece)
        if writer is not None:
            yield from self._end(writer, piece.number, piece.at)

    def _cut(self, piece: Piece, writer: _Writer) -> Iterator[Message]:
        writer.last = piece
        end = piece.offset + piece.length
        at = max(piece.offset, writer.end)  # what was sent a second time is read once
        while at < end:
            data = self._site.logs.read(piece.path, at, min(BYTES_AT_ONCE, end - at))
            if not data and piece.is_open:
                self._is_missing = True  # the machine went down, and the runner will send these bytes again
                return
            at = writer.end = at + len(data) if data else end
            for line in writer.cutter.cut(data):
                yield self._message(piece.number, piece, piece.at, line)

    def _end_at(self, piece: Piece, writers: dict[str, _Writer]) -> Iterator[Message]:
        """The piece says that what stands open ends: of one step, or of all."""
        if piece.attempt == OF_BUILD:
            ended = sorted(writers.values(), key=_last_piece)
            writers.clear()
        else:
            ended = [writers[piece.step_id]] if piece.step_id in writers else []
        for writer in ended:
            yield from self._end(writer, piece.number, piece.at)

    def _end_all(self, writers: dict[str, _Writer]) -> Iterator[Message]:
        """The build has ended, and no piece of its log says so."""
        for writer in sorted(writers.values(), key=_last_piece):
            yield from self._end(writer, self._behind + 1, writer.last.at)
        writers.clear()

    def _end(self, writer: _Writer, number: int, at: datetime) -> Iterator[Message]:
        for line in writer.cutter.flush():
            yield self._message(number, writer.last, at, line)

    def _message(self, number: int, piece: Piece, at: datetime, line: Line) -> Message:
        self._number += 1
        return Message(Position(number, self._number), piece, at, line)

    def _hand_out(self, messages: Iterable[Message]) -> Iterator[tuple[Position, bytes]]:
        """Those that the reader does not have yet."""
        for message in messages:
            if message.position > self.position:
                self.position = message.position
                yield message.position, self._encode(message)


def _take(pieces: Iterator[tuple[Position, bytes]]) -> tuple[list[tuple[Position, bytes]], bool]:
    """As much as is handed out at once; True when that was all."""
    messages: list[tuple[Position, bytes]] = []
    left = HANDED_AT_ONCE
    for message in pieces:
        messages.append(message)
        left -= len(message[1])
        if left <= 0:
            return messages, False
    return messages, True


def _last_piece(writer: _Writer) -> int:
    return writer.last.number


def _start_of_line(files: LogFiles, standing: Standing) -> int:
    """Where the line begins that stands open at the end."""
    at = standing.end
    while at > standing.flushed:
        start = max(standing.flushed, at - BYTES_AT_ONCE)
        found = files.read(standing.last.path, start, at - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return standing.flushed
