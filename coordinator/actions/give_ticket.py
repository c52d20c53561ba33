"""Give out a ticket: for who has to open a live log and cannot send a header with it."""

import secrets
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.actions.register_runner import secret_hash
from coordinator.actions.show_build import get_visible_build
from coordinator.rules.access import Caller
from coordinator.store import projects, tickets

LIFETIME = timedelta(seconds=30)
FOLLOWING = "build:read"


@dataclass(frozen=True)
class GivenTicket:
    """The ticket itself is known to nobody but its caller; it opens until that moment."""

    ticket: str
    expires_at: datetime


def give_ticket(tx: Session, caller: Caller, build_id: str, *, now: datetime) -> GivenTicket:
    """A ticket for the live log of this build, as good as the credential that asks for it and no longer."""
    follower = replace(caller, permission=FOLLOWING)
    build = get_visible_build(tx, follower, build_id)
    tenant_id = projects.get_project(tx, follower, build.project_id).tenant_id
    given = GivenTicket(secrets.token_urlsafe(32), now + LIFETIME)
    tickets.delete_old_tickets(tx, now=now)
    tickets.insert_ticket(
        tx,
        ticket_hash=secret_hash(given.ticket),
        build_id=build_id,
        tenant_id=tenant_id,
        credential=caller.credential,
        user_id=caller.user_id,
        credential_expires_at=caller.expires_at,
        expires_at=given.expires_at,
    )
    return given
