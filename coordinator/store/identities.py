"""Whom a credential stands for: the users, sessions and tokens as every request looks them up."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.engine import Row
from sqlmodel import Session

from coordinator.access_tables import ApiToken, LoginSession, Membership, User
from coordinator.tables import table_of

USERS = table_of(User)
MEMBERSHIPS = table_of(Membership)
LOGINS = table_of(LoginSession)
TOKENS = table_of(ApiToken)


@dataclass(frozen=True)
class KnownUser:
    """A user who may act now, and the role in each tenant."""

    user_id: str
    is_admin: bool
    roles: dict[str, str]


@dataclass(frozen=True)
class KnownToken:
    """An API token that counts, the user it acts for, and what it was limited to."""

    token_id: str
    tenant_id: str
    permissions: frozenset[str]
    user: KnownUser | None
    expires_at: datetime | None


def find_login_user(tx: Session, login_id: str, user_id: str, *, now: datetime) -> KnownUser | None:
    """The user of a session that has not ended, unless disabled or all tokens were called back."""
    statement = (
        select(USERS.c.id, USERS.c.is_admin)
        .join(LOGINS, LOGINS.c.user_id == USERS.c.id)
        .where(
            LOGINS.c.id == login_id,
            LOGINS.c.user_id == user_id,
            LOGINS.c.ended_at.is_(None),
            LOGINS.c.expires_at > now,
            LOGINS.c.token_version == USERS.c.token_version,
            USERS.c.disabled_at.is_(None),
        )
    )
    return _known(tx, tx.connection().execute(statement).first())


def find_token(tx: Session, token_hash: bytes, *, now: datetime) -> KnownToken | None:
    """The API token with this digest, while it counts and its user, if it has one, may act."""
    row = tx.connection().execute(select(TOKENS).where(TOKENS.c.token_hash == token_hash)).first()
    return _counting(tx, row, now)


def find_token_by_id(tx: Session, token_id: str, *, now: datetime) -> KnownToken | None:
    """The same by id, for who was let in with it before."""
    row = tx.connection().execute(select(TOKENS).where(TOKENS.c.id == token_id)).first()
    return _counting(tx, row, now)


def _counting(tx: Session, row: Row[Any, Any] | Row[Any] | None, now: datetime) -> KnownToken | None:
    if row is None or row.revoked_at is not None or (row.expires_at is not None and row.expires_at <= now):
        return None
    user = None
    if row.user_id is not None:
        user = _known(
            tx,
            tx.connection()
            .execute(
                select(USERS.c.id, USERS.c.is_admin).where(
                    USERS.c.id == row.user_id, USERS.c.disabled_at.is_(None)
                )
            )
            .first(),
        )
        if user is None:
            return None
    return KnownToken(row.id, row.tenant_id, frozenset(row.permissions), user, row.expires_at)


def _known(tx: Session, row: Row[Any, Any] | Row[Any] | None) -> KnownUser | None:
    if row is None:
        return None
    roles = tx.connection().execute(
        select(MEMBERSHIPS.c.tenant_id, MEMBERSHIPS.c.role).where(MEMBERSHIPS.c.user_id == row.id)
    )
    return KnownUser(row.id, row.is_admin, {row.tenant_id: row.role for row in roles})
