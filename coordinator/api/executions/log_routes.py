"""The log of a build over HTTP: as lines of JSON or as text, all of it or what follows a position."""

from collections.abc import AsyncIterator
from functools import partial

import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from coordinator.actions.give_ticket import give_ticket as give_ticket_action
from coordinator.actions.read_build_log import BuildLog, show_build_log
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.api.executions.log_reader import LogReader
from coordinator.api.executions.log_shapes import (
    NDJSON,
    TEXT,
    LogMessage,
    LogQuery,
    StreamQuery,
    TicketIn,
    TicketOut,
    message_line,
    message_text,
)
from coordinator.api.executions.operations import error, operation
from coordinator.errors import Invalid, NotFound, Unavailable
from coordinator.rules.access import Audience, Policy, Scope
from coordinator.rules.log_lines import behind
from shared.clock import to_wire
from shared.faults import Fault

log = structlog.get_logger()

STREAM_PATH = "/builds/{id}/logs/stream"
READ = Policy(Audience.USER, "build:read", Scope.HEADER)
TAG = "Build Execution"


async def read_build_log(call: Call) -> Response:
    build_id = call.path["id"]
    standing = await call.read(show_build_log, call.caller, build_id)
    query: LogQuery = call.query
    is_text = query.format == "text" or (query.format is None and _prefers_text(call.request))
    encode = message_text if is_text else partial(message_line, build_id)
    reader = LogReader(call.state.site, call.read, build_id, encode, query.start)
    said = _until(reader, standing)
    first = await anext(said, b"")  # where not even that can be read it is refused, and no empty log
    return _LogAnswer(_behind(first, said), media_type=TEXT if is_text else NDJSON)


class _LogAnswer(StreamingResponse):
    """Never looks whole when it is not."""

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except (NotFound, Unavailable) as error:
            # it was deleted, or the database went away: the answer is cut off before its last chunk
            log.info("log_cut_off", reason=error.code)


async def _behind(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for some in rest:
        yield some


async def _until(reader: LogReader, standing: BuildLog) -> AsyncIterator[bytes]:
    """What there was when it was asked for; a build that goes on talking would otherwise never end this."""
    while True:
        batch = await reader.read()
        if batch.messages:
            yield b"".join(said for _, said in batch.messages)
        if batch.is_end or batch.is_waiting:
            return
        if not standing.is_whole and reader.position >= behind(standing.last):
            return


def _prefers_text(request: Request) -> bool:
    """The Accept header names text and not JSON."""
    named = {part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")}
    return bool(named & {"text/plain", "text/*"}) and not named & {NDJSON, "application/json"}


async def refuse_without_upgrade(_call: Call) -> Response:
    raise Invalid(
        "this is a WebSocket: ask for it with the headers of an upgrade",
        details=(Fault("Upgrade", "must be websocket"),),
    )


async def give_ticket(call: Call) -> Response:
    given = await call.write(give_ticket_action, call.caller, call.body.build_id.lower())
    return json_answer(TicketOut(ticket=given.ticket, expires_at=to_wire(given.expires_at)), 201)


ENDPOINTS: list[Endpoint] = [
    operation(
        "GET",
        "/builds/{id}/logs",
        read_build_log,
        "Get build logs",
        description="Lines of JSON, one message each, in the order in which they were written; as text only "
        "the lines themselves. Ends with what there is; to go on, ask again `from` the last metadata.seq.",
        tag=TAG,
        policy=READ,
        query=LogQuery,
        is_contract=True,
        ok={200: Answer("The messages", LogMessage, NDJSON, ("text/plain",))},
    ),
    operation(
        "GET",
        STREAM_PATH,
        refuse_without_upgrade,
        "Stream build logs",
        description="A WebSocket: each message is one frame of text. Without an upgrade it is a bad request.",
        tag=TAG,
        policy=READ,
        query=StreamQuery,
        is_contract=True,
        ok={},
    ),
    operation(
        "POST",
        "/auth/ws-tickets",
        give_ticket,
        "Get a ticket for a live log",
        description="For callers that cannot send headers with a WebSocket, such as pages: "
        "`?ticket=` opens the log of this build once, within 30 seconds.",
        tag="Authentication",
        policy=Policy(Audience.USER, "ticket:create", Scope.RESOURCE),
        body=TicketIn,
        errors={404: error("There is no such build")},
        ok={201: Answer("The ticket", TicketOut)},
    ),
]
