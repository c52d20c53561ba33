"""A login ends, or all logins of a user."""

from datetime import datetime

from sqlmodel import Session

from coordinator.errors import Invalid
from coordinator.rules.access import Caller
from coordinator.store import accounts, audit


def log_out(tx: Session, caller: Caller, *, everywhere: bool, now: datetime) -> None:
    """End the login that the caller's token belongs to; its tokens stop to count."""
    kind, _, login_id = caller.credential.partition(":")
    if kind != "login" or caller.user_id is None:
        raise Invalid("this credential belongs to no login; a token is revoked, not logged out")
    if everywhere:
        accounts.call_back_tokens(tx, caller.user_id, now=now)
    else:
        accounts.end_login(tx, login_id, now=now)
    audit.record(
        tx, caller, "login.ended", now=now, loginId=login_id, everywhere=True if everywhere else None
    )
