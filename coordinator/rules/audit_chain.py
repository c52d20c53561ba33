"""The chain of the audit trail: how one hash leads to the next, and what is written down of it elsewhere.

The hash of a row is the SHA-256 of a JSON array: the hash before it, its number, its chain, and what the row
says. Whoever changes a row has to change every hash behind it, and these stand in the checkpoints, which
need a key that is not in the database.
"""

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

NO_TENANT = "installation"  # no tenant has this for its id
_ROW = "buildmill audit row 1"
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True)
_CHECKPOINT = b"buildmill audit checkpoint 1\n"


class Sayings(Protocol):
    """What a row of the trail says; its place in the chain is not part of it."""

    id: Any
    tenant_id: Any
    project_id: Any
    action: Any
    actor: Any
    address: Any
    details: Any
    created_at: Any


@dataclass(frozen=True)
class Link:
    """A place in a chain: how many rows it has up to here, and the hash that stands for all of them."""

    seq: int
    hash: bytes


START = Link(0, bytes(32))


def chain_of(tenant_id: str | None) -> str:
    """Each tenant has a chain of its own, and so has what belongs to none."""
    return tenant_id or NO_TENANT


def link_after(last: Link, chain: str, row: Sayings) -> Link:
    """The place of a row that follows `last`; ValueError or TypeError for what no row of ours can say."""
    seq = last.seq + 1
    return Link(seq, hash_of(last.hash, seq, chain, row))


def hash_of(before: bytes, seq: int, chain: str, row: Sayings) -> bytes:
    """The one spelling of a row behind this hash, hashed."""
    said = [
        _ROW,
        before.hex(),
        seq,
        chain,
        row.id,
        row.tenant_id,
        row.project_id,
        row.action,
        row.actor,
        row.address,
        row.details,
        _moment(row.created_at),
    ]
    return hashlib.sha256(_spelled(said)).digest()


def link_unreadable(last: Link, chain: str, row_id: str) -> Link:
    """The place of a row that does not say what a row can say, so that the chain goes on behind it."""
    said = [f"{_ROW} unreadable", last.hash.hex(), last.seq + 1, chain, row_id]
    return Link(last.seq + 1, hashlib.sha256(_spelled(said)).digest())


def _spelled(value: Any) -> bytes:
    return _ENCODER.encode(value).encode("ascii")


def _moment(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="microseconds")


# --- checkpoints


class BadCheckpoint(Exception):
    """This line was not written with the key, or not behind the line before it."""


@dataclass(frozen=True)
class Checkpoint:
    """How far a chain had come at a moment."""

    chain: str
    seq: int
    hash: bytes
    at: datetime


def spell_checkpoint(key: bytes, before: str, checkpoint: Checkpoint) -> tuple[str, str]:
    """The line of a checkpoint and its seal; `before` is the seal of the line before it, "" for the first."""
    said = {
        "chain": checkpoint.chain,
        "seq": checkpoint.seq,
        "hash": checkpoint.hash.hex(),
        "at": _moment(checkpoint.at),
    }
    seal = _seal(key, before, said)
    return json.dumps({**said, "seal": seal}, separators=(",", ":")), seal


def read_checkpoint(key: bytes, before: str, line: str) -> tuple[Checkpoint, str]:
    """The checkpoint of a line and its seal, or BadCheckpoint."""
    said = _fields(line)
    seal = said.pop("seal", None)
    if not isinstance(seal, str) or not hmac.compare_digest(
        seal.encode("utf-8", "replace"), _seal(key, before, said).encode()
    ):
        raise BadCheckpoint("its seal does not fit")
    try:
        at, hashed = datetime.fromisoformat(said["at"]), bytes.fromhex(said["hash"])
        return Checkpoint(str(said["chain"]), int(said["seq"]), hashed, at), seal
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint("it is no checkpoint") from error


def seal_in(line: str) -> str:
    """The seal that a line claims to have, "" when it has none."""
    try:
        return str(_fields(line).get("seal", ""))
    except BadCheckpoint:
        return ""


def _fields(line: str) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint("it is no checkpoint") from error
    if not isinstance(said, dict):
        raise BadCheckpoint("it is no checkpoint")
    return said


def _seal(key: bytes, before: str, said: Mapping[str, Any]) -> str:
    text = _CHECKPOINT + before.encode("utf-8", "replace") + b"\n" + _spelled(said)
    return hmac.new(key, text, hashlib.sha256).hexdigest()
