"""The wire models of logs, and how one message is written."""

import json
from typing import Annotated, Literal

from pydantic import Field

from coordinator.api.endpoint import Query
from coordinator.api.executions.log_reader import Message
from coordinator.api.executions.shapes import Input, Shape
from coordinator.rules.log_lines import BEGINNING, Level, Position, position_in
from shared.clock import to_wire

NDJSON = "application/x-ndjson"
TEXT = "text/plain; charset=utf-8"
_UUID = r"^[0-9A-Fa-f]{8}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{4}-[0-9A-Fa-f]{12}$"
_POSITION = r"^(?:0|[0-9]{1,18}\.[0-9]{1,18})$"


class LogMessage(Shape):
    """One line of a log, or a part of a line that is longer than 64 KiB."""

    build_id: Annotated[str, Field(json_schema_extra={"format": "uuid"})]
    timestamp: Annotated[str, Field(description="When its last byte arrived, RFC 3339 in UTC")]
    level: Annotated[Level, Field(description="Of what a step says INFO; our own lines say it themselves")]
    message: Annotated[str, Field(description="The line without its end; what is no UTF-8 is replaced")]
    metadata: Annotated[
        dict[str, str],
        Field(
            description="seq: its position, for `from`; step and attempt: who wrote it; container: in which; "
            "partial: true while more of the same line follows in the next message of its step"
        ),
    ]


class _From(Query):
    """Where a reader begins."""

    from_: Annotated[
        str, Field(alias="from", pattern=_POSITION, description="Only what follows this metadata.seq")
    ] = "0"

    @property
    def start(self) -> Position:
        return position_in(self.from_) or BEGINNING


class LogQuery(_From):
    """From where on, and as what."""

    format: Annotated[
        Literal["json", "text"] | None,
        Field(description="`text` is the lines alone; without it the Accept header decides"),
    ] = None


class StreamQuery(_From):
    """From where on, and who asks, for callers that cannot send headers."""

    ticket: Annotated[
        str | None, Field(max_length=128, description="From POST /api/v1/auth/ws-tickets; counts once")
    ] = None
    tenant: Annotated[
        str | None, Field(max_length=36, description="The tenant, where no X-Tenant-ID header can be sent")
    ] = None


class TicketIn(Input):
    """Which log the ticket opens."""

    build_id: Annotated[str, Field(pattern=_UUID, json_schema_extra={"format": "uuid"})]


class TicketOut(Shape):
    """A ticket: whoever shows it first, in time, is the caller it was given to."""

    ticket: str
    expires_at: str


def message_json(build_id: str, message: Message) -> bytes:
    """The message as the contract has it."""
    piece, line = message.piece, message.line
    metadata = {"seq": str(message.position), "step": piece.step, "attempt": str(piece.attempt)}
    if piece.container is not None:
        metadata["container"] = piece.container
    if line.is_partial:
        metadata["partial"] = "true"
    said = {
        "build_id": build_id,
        "timestamp": to_wire(message.at),
        "level": line.level,
        "message": line.text.decode("utf-8", "replace"),
        "metadata": metadata,
    }
    return json.dumps(said, ensure_ascii=False).encode()


def message_line(build_id: str, message: Message) -> bytes:
    return message_json(build_id, message) + b"\n"


def message_text(message: Message) -> bytes:
    """The line as it was written; what is one line stays one."""
    return message.line.text if message.line.is_partial else message.line.text + b"\n"
