"""A new user, who belongs to no tenant yet."""

from datetime import datetime

from sqlmodel import Session

from coordinator.access_tables import User
from coordinator.errors import AlreadyExists, Invalid
from coordinator.rules.access import Caller
from coordinator.rules.names import canonical_email
from coordinator.store import accounts, audit
from shared.faults import Fault
from shared.ids import new_id
from shared.references import InvalidReference, display_name


def create_user(
    tx: Session,
    caller: Caller,
    *,
    email: str,
    name: str,
    password_hash: str,
    is_admin: bool,
    now: datetime,
) -> User:
    """Make the user; the password comes hashed, as that takes time."""
    user = User(
        id=new_id(),
        email=checked_email(email),
        name=checked_name(name),
        password_hash=password_hash,
        is_admin=is_admin,
        created_at=now,
        updated_at=now,
    )
    if not accounts.insert_user(tx, user):
        raise AlreadyExists("a user with this address already exists")
    audit.record(
        tx, caller, "user.created", now=now, userId=user.id, email=user.email, isAdmin=is_admin or None
    )
    return user


def checked_email(email: str) -> str:
    """The canonical address, or Invalid."""
    canonical = canonical_email(email)
    if canonical is None:
        raise Invalid(
            "the user is not valid", details=(Fault("email", "must be an e-mail address in plain ASCII"),)
        )
    return canonical


def checked_name(name: str) -> str:
    """A name that can be shown; it may be empty."""
    if not name:
        return ""
    try:
        return display_name(name, maximum=100)
    except InvalidReference as error:
        raise Invalid("the user is not valid", details=(Fault("name", str(error)),)) from error
