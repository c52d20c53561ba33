"""Where the chains of the audit trail end."""

from sqlmodel import Session

from coordinator.rules.audit_chain import Link
from coordinator.store import audit_chain


def list_chain_ends(tx: Session, *, after: str, limit: int) -> dict[str, Link]:
    """So many chains behind `after` by their names, each with its last link."""
    ends: dict[str, Link] = {}
    while len(ends) < limit and (chain := audit_chain.find_next_chain(tx, after)) is not None:
        ends[chain] = audit_chain.find_last(tx, chain)
        after = chain
    return ends
