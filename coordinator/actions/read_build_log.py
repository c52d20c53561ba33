"""The log of a build: which pieces it has, of which steps, and whether more may come."""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlmodel import Session

from coordinator.actions.show_build import get_visible_build
from coordinator.errors import Expired
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import builds, logs
from shared.states import FINAL_BUILD_STATES, StepState

PIECES_AT_ONCE = 200


@dataclass(frozen=True)
class Piece:
    """One piece: `length` bytes at `offset` of the log of this attempt, which came at this moment.

    An `attempt` of 0 is no piece of a log, but the end of everything that stands open. More may be written to
    the same file as long as it `is_open`.
    """

    number: int
    step_id: str
    step: str
    attempt: int
    container: str | None
    path: Path
    offset: int
    length: int
    at: datetime
    is_open: bool


@dataclass(frozen=True)
class Pieces:
    """Some pieces in their order; `is_end`: no other will follow."""

    found: tuple[Piece, ...]
    is_end: bool


@dataclass(frozen=True)
class Standing:
    """How far one attempt had come by its `last` piece: to byte `end`, all lines ended up to `flushed`."""

    last: Piece
    end: int
    flushed: int


@dataclass(frozen=True)
class BuildLog:
    """How many pieces there are by now, and whether it `is_whole`: no other will follow."""

    last: int
    is_whole: bool


def show_build_log(tx: Session, caller: Caller, build_id: str) -> BuildLog:
    """How the log stands, if the caller may read it and it was kept."""
    build = get_visible_build(tx, caller, build_id)
    if build.logs_expired_round and build.logs_expired_round >= build.round:
        raise Expired("this log has expired")
    # in this order, as what is asked for last may be newer
    is_whole = build.state in FINAL_BUILD_STATES
    return BuildLog(logs.find_last(tx, build_id), is_whole)


def read_build_log(tx: Session, site: Site, build_id: str, *, after: int) -> Pieces:
    """The pieces behind this one, as many as are read at once. Who may read was asked before."""
    build = builds.get_build(tx, build_id)
    if build.expired_at is not None:
        raise Expired("this build was deleted")
    is_whole = build.state in FINAL_BUILD_STATES
    found = logs.list_pieces(tx, build_id, after=after, limit=PIECES_AT_ONCE)
    return Pieces(tuple(_piece(site, row) for row in found), is_whole and len(found) < PIECES_AT_ONCE)


def list_standings(tx: Session, site: Site, build_id: str, *, before: int) -> list[Standing]:
    """How the latest attempt of each step that had said something stood in front of this piece."""
    ends = {row.step_id: row for row in sorted(logs.list_ends(tx, build_id, before=before), key=_attempt)}
    pieces = logs.list_these(tx, build_id, [row.last for row in ends.values()])
    return [Standing(_piece(site, pieces[row.last]), row.end, row.flushed) for row in ends.values()]


def _attempt(row: Any) -> int:
    return int(row.attempt)


def _piece(site: Site, row: Any) -> Piece:
    is_current = row.attempt == row.current_attempt
    return Piece(
        number=row.seq,
        step_id=row.step_id,
        step=row.name or "",
        attempt=row.attempt,
        container=_container(row),
        path=site.logs.path(row.build_id, row.step_id, row.attempt),
        offset=row.byte_offset,
        length=row.byte_length,
        at=row.at,
        is_open=is_current and not StepState(row.state).is_final,
    )


def _container(row: Any) -> str | None:
    """The name that the engine shows, for what came out of a container."""
    if not row.image_digest or not row.runner_id or row.started_at is None or row.at < row.started_at:
        return None
    return f"buildmill-{row.runner_id[-8:]}-{row.step_id}-{row.attempt}"
