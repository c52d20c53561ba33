"""Enrolment tokens, known by their digest."""

from datetime import datetime
from typing import Any

from sqlalchemy import select as core_select
from sqlalchemy import update
from sqlalchemy.engine import Row
from sqlmodel import Session, col, select

from coordinator.access_tables import EnrolmentToken
from coordinator.errors import Foreign, NotFound
from coordinator.rules.access import Caller
from coordinator.tables import table_of

TOKENS = table_of(EnrolmentToken)


def insert_token(tx: Session, token: EnrolmentToken) -> None:
    tx.add(token)
    tx.flush()


def find_token(tx: Session, token_hash: bytes) -> Row[Any] | None:
    """The token with this digest, whether or not it still counts."""
    return tx.connection().execute(core_select(TOKENS).where(TOKENS.c.token_hash == token_hash)).one_or_none()


def find_token_by_id(tx: Session, token_id: str) -> Row[Any] | None:
    return tx.connection().execute(core_select(TOKENS).where(TOKENS.c.id == token_id)).one_or_none()


def get_token(tx: Session, caller: Caller, token_id: str) -> EnrolmentToken:
    """The token, if the caller administers it; one that is shared is the operator's alone."""
    token = tx.get(EnrolmentToken, token_id)
    if token is None:
        raise NotFound("no such enrolment token")
    if not caller.may_administer(token.tenant_id):
        raise Foreign("no such enrolment token")
    return token


def list_tokens(tx: Session, tenant_id: str | None, *, limit: int) -> list[EnrolmentToken]:
    """The newest tokens of a tenant, or of all and the shared ones, newest first."""
    statement = select(EnrolmentToken).order_by(col(EnrolmentToken.id).desc()).limit(limit)
    if tenant_id is not None:
        statement = statement.where(col(EnrolmentToken.tenant_id) == tenant_id)
    return list(tx.exec(statement).all())


def use_token(tx: Session, token_id: str, *, now: datetime) -> bool:
    """Count one use; False when the token does not count any more. Of many at once only so many get True."""
    statement = update(TOKENS).where(
        TOKENS.c.id == token_id,
        TOKENS.c.uses < TOKENS.c.max_uses,
        TOKENS.c.expires_at > now,
        TOKENS.c.revoked_at.is_(None),
    )
    return tx.connection().execute(statement.values(uses=TOKENS.c.uses + 1)).rowcount == 1


def revoke_token(tx: Session, token_id: str, *, now: datetime) -> bool:
    """False when it was revoked before."""
    statement = update(TOKENS).where(TOKENS.c.id == token_id, TOKENS.c.revoked_at.is_(None))
    return tx.connection().execute(statement.values(revoked_at=now)).rowcount == 1
