"""The few answers and bodies that are streams: log followers, byte ranges, uploads."""

import asyncio
import base64
import json
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse

from coordinator.actions.show_step_log import LogView
from coordinator.api import guards
from coordinator.bell import Bell, log_topic
from coordinator.errors import Denied, Invalid, NotFound, RangeNotSatisfiable, TooLarge, Unauthenticated
from coordinator.store.log_files import LogFiles

CHUNK = 256 * 1024
STALL_S = 60.0
FOLLOW_POLL_S = 1.0
KEEP_ALIVE_S = 15.0
MAX_EVENT = 64 * 1024
_RANGE = re.compile(r"bytes=([0-9]{0,19})-([0-9]{0,19})")
_EVENT_ID = re.compile(r"(?:([0-9]{1,10}):)?([0-9]{1,16})")
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,16})-([0-9]{1,16})/([0-9]{1,16})")


@dataclass(frozen=True)
class Span:
    """The bytes from `start` up to, not including, `end`."""

    start: int
    end: int


@dataclass(frozen=True)
class Place:
    """How far a follower has read: up to this offset in the log of this attempt."""

    attempt: int
    offset: int


def parse_range(header: str | None, size: int) -> Span | None:
    """The one range that is asked for; None means everything (also for what we do not understand)."""
    if header is None or "," in header:
        return None  # several ranges, or thousands: the whole, as the standard allows
    found = _RANGE.fullmatch(header.strip())
    if found is None or found.group(1) == found.group(2) == "":
        return None
    first, last = found.groups()
    if first == "":
        length = int(last)
        if length == 0 or size == 0:
            raise RangeNotSatisfiable(size)
        return Span(max(0, size - length), size)
    start = int(first)
    if last and int(last) < start:
        return None
    if start >= size:
        raise RangeNotSatisfiable(size)
    return Span(start, min(size, int(last) + 1) if last else size)


def file_answer(
    request: Request,
    path: Path,
    size: int,
    *,
    media_type: str,
    headers: dict[str, str],
    etag: str | None = None,
) -> Response:
    """The first `size` bytes of a file, or the range of them that was asked for."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    if etag is not None:
        headers["ETag"] = f'"{etag}"'
        named = ",".join(request.headers.getlist("if-none-match")).split(",")
        known = {tag.strip().removeprefix("W/") for tag in named}  # as compressing proxies make it
        if known & {f'"{etag}"', "*"}:
            return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range")
    condition = request.headers.get("if-range")
    if condition is not None and (etag is None or condition != f'"{etag}"'):
        wanted = None
    span = parse_range(wanted, size)
    status = 200
    if span is not None:
        headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{size}"
        status = 206
    span = span or Span(0, size)
    headers["Content-Length"] = str(span.end - span.start)
    return StreamingResponse(
        _read_span(path, span), status_code=status, headers=headers, media_type=media_type
    )


async def _read_span(path: Path, span: Span) -> AsyncIterator[bytes]:
    if span.start >= span.end:
        return
    file = await asyncio.to_thread(path.open, "rb")
    try:
        await asyncio.to_thread(file.seek, span.start)
        left = span.end - span.start
        while left > 0:
            data = await asyncio.to_thread(file.read, min(CHUNK, left))
            if not data:
                return
            left -= len(data)
            yield data
    finally:
        file.close()


def attachment(name: str) -> str:
    """A Content-Disposition that no file name can break out of."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-150:] or "artifact"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name[-200:], safe='')}"


async def follow_log(
    look: Callable[[], Awaitable[LogView]], files: LogFiles, bell: Bell, step_id: str, start: Place
) -> AsyncIterator[bytes]:
    """The log as server-sent events: each names the place behind it, so that a reader can resume there.

    `data` is JSON: `{offset, text}` with undecodable bytes replaced, and `base64` beside it where any were.
    When another attempt takes the step over, `attempt` says so and its log comes from the start.
    The last event is `end`; without it the stream ends when there is nothing to be seen any more, or with
    this process.
    """
    attempt, position = start.attempt, start.offset
    silent_s = 0.0
    while True:
        ear = bell.listen(log_topic(step_id))
        try:
            try:
                view = await look()
            except (Unauthenticated, Denied, NotFound):
                return  # who asks anew is told why
            if view.attempt != attempt:
                if attempt:  # who has seen none yet need not hear that it is another
                    yield _attempt(view)
                attempt, position = view.attempt, 0
            while position < view.size:
                length = min(MAX_EVENT, view.size - position)
                data = await asyncio.to_thread(files.read, view.path, position, length)
                if not data:
                    break
                yield _event(Place(attempt, position), data)
                position += len(data)
                silent_s = 0.0
            if not view.is_open:
                yield _end(Place(attempt, position), view)
                return
            if bell.is_closed:
                return
            if not await ear.wait(FOLLOW_POLL_S):
                silent_s += FOLLOW_POLL_S
                if silent_s >= KEEP_ALIVE_S:
                    yield b": still here\n\n"
                    silent_s = 0.0
        finally:
            ear.close()


def _event(place: Place, data: bytes) -> bytes:
    said: dict[str, object] = {"offset": place.offset, "text": data.decode("utf-8", "replace")}
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        said["base64"] = base64.b64encode(data).decode()
    return _say("log", Place(place.attempt, place.offset + len(data)), said)


def _attempt(view: LogView) -> bytes:
    return _say("attempt", Place(view.attempt, 0), {"attempt": view.attempt})


def _end(place: Place, view: LogView) -> bytes:
    return _say("end", place, {"size": view.size, "state": view.state, "sha256": view.sha256})


def _say(event: str, place: Place, said: dict[str, object]) -> bytes:
    return f"id: {place.attempt}:{place.offset}\nevent: {event}\ndata: {json.dumps(said)}\n\n".encode()


def last_event_id(request: Request, view: LogView, *, asked_for: int | None) -> Place:
    """Where a resuming reader left off; the start when it says nothing we gave out.

    An id used to be an offset alone: it counts for the attempt that is asked for, or else for the first.
    """
    found = _EVENT_ID.fullmatch(request.headers.get("last-event-id", ""))
    if found is None or view.attempt == 0:
        return Place(view.attempt, 0)
    attempt = int(found.group(1) or asked_for or 1)
    return Place(attempt, min(int(found.group(2)), view.size) if attempt == view.attempt else 0)


async def read_append(request: Request, *, limit: int, inflated_limit: int, deadline_s: float) -> bytes:
    """The bytes of a log append, inflated when they are gzip; both lengths are bounded."""
    encoding = request.headers.get("content-encoding", "identity").lower()
    headers = [pair for pair in request.scope["headers"] if pair[0] != b"content-encoding"]
    if encoding not in ("identity", "gzip"):
        raise guards.UnsupportedEncoding("a log may be sent as it is or as gzip")
    data = await guards.read_body(request.receive, headers, limit=limit, deadline_s=deadline_s)
    if encoding == "identity":
        return data
    inflater = zlib.decompressobj(wbits=31)
    try:
        inflated = inflater.decompress(data, inflated_limit + 1)
    except zlib.error as error:
        raise Invalid("the body is not gzip") from error
    if len(inflated) > inflated_limit:
        raise TooLarge("the inflated body is too large", limit=inflated_limit)
    if not inflater.eof or inflater.unused_data:
        raise Invalid("the body is not one whole gzip stream")
    return inflated


def content_range(request: Request) -> tuple[int, int, int] | None:
    """`Content-Range: bytes first-last/total` of an upload in parts; None when it is whole."""
    header = request.headers.get("content-range")
    if header is None:
        return None
    found = _CONTENT_RANGE.fullmatch(header)
    if found is None:
        raise Invalid("the Content-Range header is not valid")
    first, last, total = (int(group) for group in found.groups())
    if not first <= last < total:
        raise Invalid("the Content-Range header is not valid")
    return first, last, total


async def receive_chunks(request: Request, *, limit: int) -> AsyncIterator[bytes]:
    """The body piece by piece; no more than `limit` bytes, and never a minute without one."""
    received = 0
    chunks = request.stream().__aiter__()
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise guards.BodyTooSlow("no byte has arrived for a minute") from error
        except ClientDisconnect as error:
            raise guards.ClientGone("the client left before its body was complete") from error
        received += len(chunk)
        if received > limit:
            raise TooLarge(f"the body may have {limit} bytes", limit=limit)
        if chunk:
            yield chunk
