"""Rows of the audit trail that are committed get their place in the chain of their tenant.

A row that is committed later comes later, even if it was made earlier: places are given to what can be seen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog
from sqlmodel import Session

from coordinator.rules.audit_chain import Link, chain_of, link_after, link_unreadable
from coordinator.store import audit_chain

log = structlog.get_logger()


@dataclass(frozen=True)
class Sealed:
    """How many rows got their place; where their chains ended before and end now."""

    rows: int = 0
    began: Mapping[str, Link] = field(default_factory=dict)
    ends: Mapping[str, Link] = field(default_factory=dict)


def seal_trail(tx: Session, *, limit: int) -> Sealed:
    """Seal so many rows at most; none while another process does it."""
    if not audit_chain.hold_chains(tx):
        return Sealed()
    began: dict[str, Link] = {}
    ends: dict[str, Link] = {}
    places = []
    for row in audit_chain.list_unsealed(tx, limit=limit):
        chain = chain_of(row.tenant_id)
        if chain not in ends:
            ends[chain] = began[chain] = audit_chain.find_last(tx, chain)
        ends[chain] = _link(ends[chain], chain, row)
        places.append((row.id, chain, ends[chain]))
    if places:
        audit_chain.seal_rows(tx, places)
    return Sealed(len(places), began, ends)


def _link(last: Link, chain: str, row: Any) -> Link:
    try:
        return link_after(last, chain, row)
    except (ValueError, TypeError, RecursionError) as error:
        # somebody wrote into the database; the rows behind it need their places all the same
        log.error("audit_row_unreadable", id=row.id, cause=str(error))
        return link_unreadable(last, chain, row.id)
