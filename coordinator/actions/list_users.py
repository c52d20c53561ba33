"""The users of this installation."""

from sqlmodel import Session

from coordinator.access_tables import User
from coordinator.rules.access import Caller
from coordinator.store import accounts


def list_users(tx: Session, _caller: Caller, *, limit: int, offset: int) -> list[User]:
    """Oldest first; the route is for the operator alone."""
    return accounts.list_users(tx, limit=limit, offset=offset)
