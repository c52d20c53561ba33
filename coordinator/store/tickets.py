"""Tickets that open one live log once; only their digests are stored."""

from datetime import datetime
from typing import Any

from sqlalchemy import delete, insert
from sqlmodel import Session

from coordinator.access_tables import StreamTicket
from coordinator.tables import table_of

TICKETS = table_of(StreamTicket)


def insert_ticket(tx: Session, **values: Any) -> None:
    tx.connection().execute(insert(TICKETS), values)


def take_ticket(tx: Session, ticket_hash: bytes) -> Any:
    """The ticket with this digest, which is gone from now on; None where there is none."""
    taken = delete(TICKETS).where(TICKETS.c.ticket_hash == ticket_hash).returning(TICKETS)
    return tx.connection().execute(taken).one_or_none()


def delete_old_tickets(tx: Session, *, now: datetime) -> None:
    tx.connection().execute(delete(TICKETS).where(TICKETS.c.expires_at <= now))
