"""Looks for rows of the audit trail that are not what was sealed, and for rows that have gone.

Reads a bounded number of rows at a time, each in a transaction of its own: what is sealed never changes, so
the coordinator may go on meanwhile.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from itertools import groupby, islice
from typing import Any, Protocol, TypeVar

from sqlmodel import Session

from coordinator.rules.audit_chain import (
    START,
    BadCheckpoint,
    Checkpoint,
    Link,
    hash_of,
    link_unreadable,
    read_checkpoint,
    seal_in,
)
from coordinator.store import audit_chain
from coordinator.store.dialect import has_triggers

T = TypeVar("T")

ROWS_AT_ONCE = 1000
LINES_AT_ONCE = 500
TRIGGERS = frozenset({"audit_logs_no_delete", "audit_logs_no_change", "audit_logs_no_replace"})


class Read(Protocol):
    """Runs a function on a snapshot of the database."""

    def __call__(self, action: Callable[[Session], T]) -> T: ...


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was sealed: which row it is, as far as that is known, and what is wrong."""

    what: str
    sentence: str
    chain: str = ""
    seq: int | None = None
    row_id: str = ""


@dataclass
class Checked:
    """How much was looked at."""

    rows: int = 0
    chains: int = 0
    checkpoints: int = 0
    unsealed: int = 0
    unsealed_since: datetime | None = None


def verify_trail(read: Read, lines: Iterable[str], key: bytes, checked: Checked) -> Iterator[Finding]:
    """Everything that is wrong with the trail; `lines` are the checkpoints, `key` is what sealed them."""
    if not read(lambda tx: has_triggers(tx, "audit_logs", TRIGGERS)):
        yield Finding("unprotected", "the triggers that keep rows from being changed are not there")
    for row_id in read(partial(audit_chain.list_half_sealed, limit=ROWS_AT_ONCE)):
        yield Finding("inserted", "a row that has only part of a place in a chain", row_id=row_id)
    chain = read(lambda tx: audit_chain.find_next_chain(tx, ""))
    while chain is not None:
        checked.chains += 1
        yield from _verify_chain(read, chain, checked)
        chain = read(partial(audit_chain.find_next_chain, after=chain))
    yield from _Checkpoints(read, key, checked).verify(lines)
    checked.unsealed, checked.unsealed_since = read(audit_chain.count_unsealed)


# --- the rows


def _verify_chain(read: Read, chain: str, checked: Checked) -> Iterator[Finding]:
    """Each row follows from the hash that is stored before it, so that one change is found in one place."""
    last = START
    for seq, rows in groupby(_rows_of(read, chain), key=lambda row: row.seq):
        found = list(islice(rows, ROWS_AT_ONCE))
        checked.rows += len(found)
        if not isinstance(seq, int) or seq <= last.seq:
            for row in found:
                yield Finding("inserted", "no row of this chain can have such a number", chain, None, row.id)
            continue
        if seq > last.seq + 1:
            yield _gap(chain, last.seq + 1, seq - 1)
            row, *others = found
        else:
            fitting = [row for row in found if _fits(last, chain, row)]
            row = (fitting or found)[0]
            others = [other for other in found if other is not row]
            if not fitting:
                yield Finding("changed", "it is not what was sealed", chain, seq, row.id)
            elif _hash_of(last, chain, row) is None:
                yield Finding("unreadable", "it says what no row can say", chain, seq, row.id)
        for other in others:
            yield Finding("inserted", "its number belongs to another row", chain, seq, other.id)
        last = Link(seq, _hash(row))


def _rows_of(read: Read, chain: str) -> Iterator[Any]:
    after = audit_chain.BEFORE_ALL
    while rows := read(partial(audit_chain.list_sealed, chain=chain, after=after, limit=ROWS_AT_ONCE)):
        yield from rows
        after = (rows[-1].seq, rows[-1].id)


def _gap(chain: str, first: int, last: int) -> Finding:
    which = f"seq {first} is" if first == last else f"seq {first} to {last} are"
    return Finding("missing", f"{which} not there; the row behind cannot be verified", chain, first)


def _fits(last: Link, chain: str, row: Any) -> bool:
    computed = _hash_of(last, chain, row) or link_unreadable(last, chain, row.id).hash
    return computed == _hash(row)


def _hash_of(last: Link, chain: str, row: Any) -> bytes | None:
    """None for a row that cannot be read."""
    try:
        return hash_of(last.hash, last.seq + 1, chain, row)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _hash(row: Any) -> bytes:
    """What is stored; something that is no hash fits nothing."""
    return bytes(row.hash) if isinstance(row.hash, bytes | memoryview) else b""


# --- the checkpoints


@dataclass
class _Checkpoints:
    """Compares what was written down beside the database with what is in it."""

    read: Read
    key: bytes
    checked: Checked
    good: dict[str, int] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def verify(self, lines: Iterable[str]) -> Iterator[Finding]:
        before, number, rest = "", 0, iter(lines)
        while some := list(islice(rest, LINES_AT_ONCE)):
            marks: list[Checkpoint] = []
            for line in some:
                number += 1
                self.checked.checkpoints += 1
                try:
                    mark, before = read_checkpoint(self.key, before, line)
                    marks.append(mark)
                except BadCheckpoint:
                    before = seal_in(line)
                    yield Finding("checkpoint", f"line {number} was changed, or one before it has gone")
            yield from self.read(partial(self._compare, marks=marks))

    def _compare(self, tx: Session, marks: Iterable[Checkpoint]) -> list[Finding]:
        """One finding for each chain: where one checkpoint is wrong, all later ones are."""
        found = []
        for mark in marks:
            if mark.chain in self.told:
                continue
            row = audit_chain.find_sealed(tx, mark.chain, mark.seq)
            if row is not None and _hash(row) == mark.hash:
                self.good[mark.chain] = mark.seq
                continue
            self.told.add(mark.chain)
            when = f"a checkpoint of {mark.at:%Y-%m-%d %H:%M:%S} UTC"
            first = self.good.get(mark.chain, 0) + 1
            if row is not None:
                sentence = f"{when} has another hash: from seq {first} on a row was changed, with all hashes"
                found.append(Finding("rewritten", sentence, mark.chain, mark.seq, row.id))
            else:
                end = audit_chain.find_last(tx, mark.chain).seq
                gone = f"seq {end + 1} to {mark.seq} are" if end < mark.seq else f"seq {mark.seq} is"
                sentence = f"{when} has seq {mark.seq}: {gone} not there"
                found.append(Finding("missing", sentence, mark.chain, min(end + 1, mark.seq)))
        return found
