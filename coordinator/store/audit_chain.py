"""The chain of the audit trail in the database: rows that wait for their place, and rows that have one."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, bindparam, func, or_, select, update
from sqlmodel import Session

from coordinator.rules.audit_chain import START, Link
from coordinator.store.dialect import hold_if_free
from coordinator.store.prepared import Found, Prepared
from coordinator.store.statements import as_new, given, new_values
from coordinator.tables import AuditLog, table_of

AUDIT = table_of(AuditLog)
BEFORE_ALL = (-(2**63), "")
MOST_COUNTED = 100_000
_SAYINGS = [column for column in AUDIT.c if column.name not in ("chain", "seq", "hash")]
_LIMIT: Any = bindparam("at_most")
_IS_UNSEALED = AUDIT.c.seq.is_(None)


def hold_chains(tx: Session) -> bool:
    """Whether nobody else seals rows until this transaction ends; does not wait for who does."""
    return hold_if_free(tx, "audit chain")


# --- sealing

_ANY_UNSEALED = Prepared(select(AUDIT.c.id).where(_IS_UNSEALED).limit(1))
_UNSEALED = Prepared(select(*_SAYINGS).where(_IS_UNSEALED).order_by(AUDIT.c.id).limit(_LIMIT))
_LAST = Prepared(
    select(AUDIT.c.seq, AUDIT.c.hash)
    .where(AUDIT.c.chain == given(AUDIT.c.chain), AUDIT.c.seq.is_not(None))
    .order_by(AUDIT.c.seq.desc())
    .limit(1)
)
_SEAL = Prepared(
    update(AUDIT)
    .where(AUDIT.c.id == given(AUDIT.c.id), _IS_UNSEALED)
    .values(new_values(AUDIT, ["chain", "seq", "hash"]))
)


def has_unsealed(tx: Session) -> bool:
    return _ANY_UNSEALED.first(tx, {}) is not None


def list_unsealed(tx: Session, *, limit: int) -> list[Found]:
    """Rows that have no place yet, in the order in which they were made."""
    return _UNSEALED.all(tx, {"at_most": limit})


def find_last(tx: Session, chain: str) -> Link:
    """Where the chain ends now."""
    row = _LAST.first(tx, {"the_chain": chain})
    return START if row is None else Link(row.seq, row.hash)


def seal_rows(tx: Session, places: Sequence[tuple[str, str, Link]]) -> None:
    """Give each row, named by its id, its place in its chain."""
    rows: list[Mapping[str, Any]] = [
        {"the_id": row_id, **as_new({"chain": chain, "seq": link.seq, "hash": link.hash})}
        for row_id, chain, link in places
    ]
    _SEAL.run_each(tx, rows)


# --- looking

_NEXT_CHAIN = Prepared(
    select(AUDIT.c.chain)
    .where(AUDIT.c.chain > given(AUDIT.c.chain), AUDIT.c.seq.is_not(None))
    .order_by(AUDIT.c.chain)
    .limit(1)
)
_SEALED = Prepared(
    select(*AUDIT.c)
    .where(
        AUDIT.c.chain == given(AUDIT.c.chain),
        AUDIT.c.seq.is_not(None),
        AUDIT.c.seq >= given(AUDIT.c.seq),
        # a second row of the same number, which only a forger can make, is met as well
        or_(AUDIT.c.seq > given(AUDIT.c.seq), AUDIT.c.id > given(AUDIT.c.id)),
    )
    .order_by(AUDIT.c.seq, AUDIT.c.id)
    .limit(_LIMIT)
)
_AT = Prepared(
    select(AUDIT.c.id, AUDIT.c.hash)
    .where(AUDIT.c.chain == given(AUDIT.c.chain), AUDIT.c.seq == given(AUDIT.c.seq))
    .where(AUDIT.c.seq.is_not(None))
    .limit(1)
)
_HALF_SEALED: ColumnElement[bool] = or_(
    (AUDIT.c.seq.is_not(None)) & or_(AUDIT.c.chain.is_(None), AUDIT.c.hash.is_(None)),
    _IS_UNSEALED & or_(AUDIT.c.chain.is_not(None), AUDIT.c.hash.is_not(None)),
)


def find_next_chain(tx: Session, after: str) -> str | None:
    """The chains by name, one after the other; the first stands behind ""."""
    row = _NEXT_CHAIN.first(tx, {"the_chain": after})
    return None if row is None else row.chain


def list_sealed(tx: Session, chain: str, *, after: tuple[int, str], limit: int) -> list[Found]:
    """Rows of a chain by their number and id, behind `after`; `BEFORE_ALL` is before the first."""
    return _SEALED.all(tx, {"the_chain": chain, "the_seq": after[0], "the_id": after[1], "at_most": limit})


def find_sealed(tx: Session, chain: str, seq: int) -> Found | None:
    """Id and hash of the row in this place."""
    return _AT.first(tx, {"the_chain": chain, "the_seq": seq})


def list_half_sealed(tx: Session, *, limit: int) -> list[str]:
    """Ids of rows that have part of a place, which the database refuses and we never write."""
    statement = select(AUDIT.c.id).where(_HALF_SEALED).order_by(AUDIT.c.id).limit(limit)
    return list(tx.connection().execute(statement).scalars())


def count_unsealed(tx: Session) -> tuple[int, datetime | None]:
    """How many rows have no place yet, counted up to a limit, and when the first of them was made."""
    some = select(AUDIT.c.id).where(_IS_UNSEALED).limit(MOST_COUNTED).subquery()
    count = int(tx.connection().execute(select(func.count()).select_from(some)).scalar_one())
    first = select(AUDIT.c.created_at).where(_IS_UNSEALED).order_by(AUDIT.c.id).limit(1)
    return count, tx.connection().execute(first).scalar()


def count_rows(tx: Session) -> int:
    """Of the whole trail; reads all of an index."""
    return int(tx.connection().execute(select(func.count()).select_from(AUDIT)).scalar_one())
