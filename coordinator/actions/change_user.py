"""The operator changes a user: name, password, whether it may log in, whether it is an administrator."""

from dataclasses import dataclass
from datetime import datetime

from sqlmodel import Session

from coordinator.access_tables import User
from coordinator.actions.create_user import checked_name
from coordinator.errors import Denied
from coordinator.rules.access import Caller
from coordinator.store import accounts, audit


@dataclass(frozen=True)
class UserChanges:
    """What is to be otherwise; None stays as it is."""

    name: str | None = None
    password_hash: str | None = None
    is_disabled: bool | None = None
    is_admin: bool | None = None


def change_user(tx: Session, caller: Caller, user_id: str, changes: UserChanges, *, now: datetime) -> User:
    """Apply the changes. Where a right goes or the password changes, every login ends.

    Who is disabled, or given another password, may have been robbed: then the tokens of its programs go too.
    """
    user = accounts.lock_user(tx, user_id)
    if caller.user_id == user.id and (changes.is_disabled or changes.is_admin is False):
        raise Denied("nobody takes this right from themselves")
    if changes.name is not None:
        user.name = checked_name(changes.name)
    if changes.password_hash is not None:
        user.password_hash = changes.password_hash
    if changes.is_disabled is not None:
        user.disabled_at = (user.disabled_at or now) if changes.is_disabled else None
    if changes.is_admin is not None:
        user.is_admin = changes.is_admin
    user.updated_at = now
    tx.add(user)
    tx.flush()
    if changes.password_hash is not None or changes.is_disabled or changes.is_admin is False:
        accounts.call_back_tokens(tx, user.id, now=now)
    revoked = 0
    if changes.password_hash is not None or changes.is_disabled:
        revoked = accounts.revoke_all_tokens(tx, user.id, now=now)
    audit.record(
        tx,
        caller,
        "user.changed",
        now=now,
        userId=user.id,
        password=True if changes.password_hash is not None else None,
        isDisabled=changes.is_disabled,
        isAdmin=changes.is_admin,
        name=changes.name,
        tokensRevoked=revoked or None,
    )
    tx.refresh(user)
    return user
