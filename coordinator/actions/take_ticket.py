"""Take a ticket: whoever shows it first is the caller it was given to."""

from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Session

from coordinator.actions.register_runner import secret_hash
from coordinator.store import tickets


@dataclass(frozen=True)
class TakenTicket:
    """What the ticket was given for: a build of a tenant, and the credential behind it."""

    build_id: str
    tenant_id: str
    credential: str
    user_id: str | None
    credential_expires_at: datetime | None


def take_ticket(tx: Session, ticket: str, *, now: datetime) -> TakenTicket | None:
    """What the ticket opens, or None where it counts no longer; either way it does not count from now on."""
    found = tickets.take_ticket(tx, secret_hash(ticket))
    if found is None or found.expires_at <= now:
        return None
    return TakenTicket(
        found.build_id, found.tenant_id, found.credential, found.user_id, found.credential_expires_at
    )
