"""One reader per build for everybody who follows its log: it is read and cut once, and each line made once.

The latest frames lie in a ring. Who has taken them all waits for the next; who is so far behind that they
have left the ring, or who begins earlier, reads from the past until it has caught up, and what it has read
there stays for a while for those who come along the same way. Nobody waits for anybody.
"""

import asyncio
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import structlog

from coordinator.api.executions.log_reader import Batch, LogReader, Message, read_for_all
from coordinator.api.executions.log_shapes import message_json
from coordinator.api.state import AppState
from coordinator.api.text_frames import text_frame
from coordinator.bell import build_log_topic
from coordinator.errors import CoordinatorError, Unavailable
from coordinator.rules.log_lines import BEGINNING, Position, behind
from coordinator.store import logs

log = structlog.get_logger()

RING_BYTES = 1024 * 1024
PAST_BYTES = 8 * 1024 * 1024
MOST_READERS = 8
SENT_AT_ONCE = 64 * 1024
POLL_S = 1.0
CATCHING_UP = 4


@dataclass(frozen=True)
class _Chunk:
    """Frames that were read together, and where in them the frame behind each position begins."""

    frames: bytes
    positions: tuple[Position, ...]
    ends: tuple[int, ...]

    def behind(self, position: Position, most: int) -> tuple[bytes, Position]:
        """Whole frames, at least one and about as many bytes as are wanted at most, and where they end."""
        known = bisect_right(self.positions, position)
        start = self.ends[known - 1] if known else 0
        last = max(bisect_right(self.ends, start + most), known + 1) - 1
        return self.frames[start : self.ends[last]], self.positions[last]


class _Feed:
    """The log of one build from where the first follower found it, as far as the ring goes back."""

    def __init__(self) -> None:
        self.followers = 0
        self.past = asyncio.Lock()
        # readers of the past by the positions where they stand
        self.readers: OrderedDict[Position, LogReader] = OrderedDict()
        self.has_begun = asyncio.Event()
        self.news = asyncio.Event()
        self.is_over = False
        self.failure: CoordinatorError | None = None
        # everything behind this position is in the ring
        self.floor = BEGINNING
        self._chunks: deque[_Chunk] = deque()
        self._first = 0
        self._size = 0

    async def run(self, state: AppState, build_id: str) -> None:
        """Read the log to its end, or to the end of the last follower."""
        try:
            await self._read(state, build_id)
        except CoordinatorError as error:
            self.failure = error
        finally:
            self.is_over = True
            self.has_begun.set()
            self._tell()

    async def _read(self, state: AppState, build_id: str) -> None:
        read = read_for_all(state)
        last = await read(logs.find_last, build_id)
        self.floor = behind(last) if last else BEGINNING
        reader = LogReader(state.site, read, build_id, partial(_frame, build_id), self.floor)
        self.has_begun.set()
        while True:
            ear = state.bell.listen(build_log_topic(build_id))
            try:
                batch = await _read_some(reader)
                if batch.messages:
                    self._keep(batch)
                if batch.is_end:
                    return
                if batch.is_waiting:
                    await ear.wait(POLL_S)
            finally:
                ear.close()

    def _keep(self, batch: Batch) -> None:
        frames = [frame for _, frame in batch.messages]
        ends, at = [], 0
        for frame in frames:
            at += len(frame)
            ends.append(at)
        positions = tuple(position for position, _ in batch.messages)
        self._chunks.append(_Chunk(b"".join(frames), positions, tuple(ends)))
        self._size += at
        while self._size > RING_BYTES and len(self._chunks) > 1:
            gone = self._chunks.popleft()
            self._first += 1
            self._size -= len(gone.frames)
            self.floor = gone.positions[-1]
        self._tell()

    def _tell(self) -> None:
        self.news.set()
        self.news = asyncio.Event()

    def take(self, number: int | None, position: Position) -> tuple[bytes, int, Position]:
        """What lies behind a position, some of it, and the number of the chunk and the position behind that.

        `number` is that of the chunk which follows, None for who does not know it.
        """
        at = self._seek(position) if number is None else number - self._first
        frames = bytearray()
        while at < len(self._chunks) and len(frames) < SENT_AT_ONCE:
            chunk = self._chunks[at]
            if chunk.positions[-1] > position:
                some, position = chunk.behind(position, SENT_AT_ONCE - len(frames))
                frames += some
            if position >= chunk.positions[-1]:
                at += 1
        return bytes(frames), at + self._first, position

    def _seek(self, position: Position) -> int:
        at = len(self._chunks)
        while at > 0 and self._chunks[at - 1].positions[-1] > position:
            at -= 1
        return at


@dataclass(frozen=True)
class _Some:
    """Frames that follow a position, and where they end."""

    frames: bytes
    end: Position
    is_waiting: bool
    is_end: bool


class _Past:
    """What was read last from the past of all builds, up to so many bytes."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, Position], _Some] = OrderedDict()
        self._size = 0

    def find(self, build_id: str, position: Position) -> _Some | None:
        return self._kept.get((build_id, position))

    def keep(self, build_id: str, position: Position, some: _Some) -> None:
        self._kept[build_id, position] = some
        self._size += len(some.frames)
        while self._size > PAST_BYTES:
            _, gone = self._kept.popitem(last=False)
            self._size -= len(gone.frames)


class LogFeeds:
    """The feeds of all builds that somebody follows."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._feeds: dict[str, _Feed] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(CATCHING_UP)
        self._past = _Past()

    async def follow(self, build_id: str, start: Position) -> AsyncIterator[bytes]:
        """Frames of everything behind a position, until the build has ended and all of it was said."""
        with self._joined(build_id) as feed:
            await feed.has_begun.wait()
            position, number = start, None
            while True:
                news = feed.news
                if position < feed.floor:
                    number = None
                    some = await self._read_past(feed, build_id, position)
                    position = max(position, some.end)
                    if some.frames:
                        yield some.frames
                    if some.is_end:
                        return
                    if some.is_waiting:
                        await _wait(news)
                    continue
                frames, number, position = feed.take(number, position)
                if frames:
                    yield frames
                elif feed.failure is not None:
                    raise feed.failure
                elif feed.is_over:
                    return
                else:
                    await _wait(news)

    async def _read_past(self, feed: _Feed, build_id: str, position: Position) -> "_Some":
        """What follows a position, from whoever has read it before or else from the log."""
        known = self._past.find(build_id, position)
        if known is not None:
            return known
        async with feed.past, self._turns:
            known = self._past.find(build_id, position)
            if known is not None:
                return known
            reader = feed.readers.pop(position, None)
            if reader is None:
                read = read_for_all(self._state)
                reader = LogReader(self._state.site, read, build_id, partial(_frame, build_id), position)
            batch = await _read_some(reader)
            feed.readers[reader.position] = reader
            if len(feed.readers) > MOST_READERS:
                feed.readers.popitem(last=False)
        frames = b"".join(frame for _, frame in batch.messages)
        some = _Some(frames, reader.position, batch.is_waiting, batch.is_end)
        if frames and not some.is_end:
            self._past.keep(build_id, position, some)
        return some

    @contextmanager
    def _joined(self, build_id: str) -> Iterator[_Feed]:
        feed = self._feeds.get(build_id)
        if feed is None or feed.is_over:
            feed = self._feeds[build_id] = _Feed()
            self._tasks[build_id] = asyncio.create_task(feed.run(self._state, build_id))
        feed.followers += 1
        try:
            yield feed
        finally:
            feed.followers -= 1
            if feed.followers == 0 and self._feeds.get(build_id) is feed:
                del self._feeds[build_id]
                self._tasks.pop(build_id).cancel()


async def _read_some(reader: LogReader) -> Batch:
    """What comes next; a database that cannot answer now is asked again in a moment."""
    try:
        return await reader.read()
    except Unavailable:
        await asyncio.sleep(POLL_S)
        return Batch([])


async def _wait(news: asyncio.Event) -> None:
    """Until the feed has something new; without a word for a moment it is looked at all the same."""
    try:
        async with asyncio.timeout(POLL_S):
            await news.wait()
    except TimeoutError:
        return


def _frame(build_id: str, message: Message) -> bytes:
    return text_frame(message_json(build_id, message))
