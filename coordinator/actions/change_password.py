"""A user sets another password, and is logged out everywhere."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.log_in import count_try, forgive_try
from coordinator.errors import Denied, Invalid
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import accounts, audit


def begin_change(tx: Session, site: Site, caller: Caller, *, now: datetime) -> str:
    """What is stored of the caller's password; guesses count as they do at a login."""
    if caller.user_id is None or not caller.credential.startswith("login:"):
        raise Invalid("only a user who has logged in has a password to change")
    user = accounts.get_user(tx, caller.user_id)
    count_try(tx, site, user.email, address=caller.address, now=now)
    return user.password_hash


def change_password(tx: Session, caller: Caller, before: str, after: str, *, now: datetime) -> None:
    """Replace the stored password `before`, which the caller has shown to know."""
    user = accounts.lock_user(tx, caller.user_id or "")
    if user.password_hash != before:
        raise Denied("the password has been changed meanwhile")
    user.password_hash = after
    user.updated_at = now
    tx.add(user)
    tx.flush()
    accounts.call_back_tokens(tx, user.id, now=now)
    forgive_try(tx, user.email, address=caller.address)
    audit.record(tx, caller, "user.password_changed", now=now, userId=user.id)
