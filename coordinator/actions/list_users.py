"""The users of this installation."""

from sqlmodel import Session

from coordinator.access_tables import User
from coordinator.rules.access import Caller
from coordinator.rules.names import canonical_email
from coordinator.store import accounts


def list_users(tx: Session, _caller: Caller, *, email: str | None, limit: int, offset: int) -> list[User]:
    """Oldest first, or only the one of this address; the route is for the operator alone."""
    if email is not None:
        canonical = canonical_email(email)
        found = accounts.find_user(tx, canonical) if canonical is not None else None
        return [found] if found is not None and offset == 0 else []
    return accounts.list_users(tx, limit=limit, offset=offset)
