"""The rows of who may do what: users, memberships, sessions, tokens, and what protects them from guessing."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, Column, ForeignKey, Index, Integer, LargeBinary, String
from sqlmodel import Field

from coordinator.tables import Row, json_field, long_text, moment, own_id, reference


def _digest(*, unique: bool = True) -> Any:
    return Field(sa_column=Column(LargeBinary(32), unique=unique, nullable=False))


class User(Row, table=True):
    """A person who logs in; `token_version` grows when every token given out before must stop to count."""

    __tablename__ = "users"
    id: str = own_id()
    email: str = Field(sa_column=Column(String(254), unique=True, nullable=False))
    name: str = Field(default="", sa_column=Column(String(100), nullable=False))
    password_hash: str = long_text(nullable=False)
    is_admin: bool = Field(default=False, nullable=False)
    token_version: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    created_at: datetime = moment(nullable=False)
    updated_at: datetime = moment(nullable=False)
    disabled_at: datetime | None = moment()


class Membership(Row, table=True):
    """A user belongs to a tenant in one role."""

    __tablename__ = "memberships"
    tenant_id: str = Field(sa_column=Column(String(36), ForeignKey("tenants.id"), primary_key=True))
    user_id: str = Field(sa_column=Column(String(36), ForeignKey("users.id"), primary_key=True, index=True))
    role: str = Field(sa_column=Column(String(16), nullable=False))
    created_at: datetime = moment(nullable=False)


class LoginSession(Row, table=True):
    """What one login opened; its refresh token is replaced with each use."""

    __tablename__ = "login_sessions"
    id: str = own_id()
    user_id: str = reference("users")
    refresh_hash: bytes = _digest()
    former_refresh_hash: bytes | None = Field(default=None, sa_column=Column(LargeBinary(32), index=True))
    token_version: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    created_at: datetime = moment(nullable=False)
    refreshed_at: datetime = moment(nullable=False)
    expires_at: datetime = moment(nullable=False, index=True)
    ended_at: datetime | None = moment()


class ApiToken(Row, table=True):
    """A token for a program; `user_id` None is one that the operator made for nobody in particular."""

    __tablename__ = "api_tokens"
    id: str = own_id()
    tenant_id: str = reference("tenants")
    user_id: str | None = reference("users", nullable=True)
    name: str = Field(sa_column=Column(String(100), nullable=False))
    token_hash: bytes = _digest()
    permissions: list[str] = json_field(list)
    created_at: datetime = moment(nullable=False)
    expires_at: datetime | None = moment()
    revoked_at: datetime | None = moment()


class EnrolmentToken(Row, table=True):
    """Lets machines become runners; `tenant_id` None makes runners that serve every tenant."""

    __tablename__ = "enrolment_tokens"
    id: str = own_id()
    tenant_id: str | None = reference("tenants", nullable=True)
    name: str = Field(sa_column=Column(String(100), nullable=False))
    token_hash: bytes = _digest()
    labels: list[str] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    max_uses: int = Field(default=1, sa_column=Column(Integer, nullable=False))
    uses: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    created_at: datetime = moment(nullable=False)
    expires_at: datetime = moment(nullable=False)
    revoked_at: datetime | None = moment()


class StreamTicket(Row, table=True):
    """Opens one live log once, within seconds; `credential` names what it was given for."""

    __tablename__ = "stream_tickets"
    __table_args__ = (Index("ix_stream_tickets_age", "expires_at"),)
    ticket_hash: bytes = Field(sa_column=Column(LargeBinary(32), primary_key=True))
    build_id: str = Field(sa_column=Column(String(36), nullable=False))
    tenant_id: str = Field(sa_column=Column(String(36), nullable=False))
    credential: str = Field(sa_column=Column(String(128), nullable=False))
    user_id: str | None = Field(default=None, sa_column=Column(String(36)))
    credential_expires_at: datetime | None = moment()
    expires_at: datetime = moment(nullable=False)


class LoginCount(Row, table=True):
    """How often a login has failed lately, by account and by peer; survives restarts."""

    __tablename__ = "login_counts"
    __table_args__ = (Index("ix_login_counts_age", "window_ends_at"),)
    key: str = Field(sa_column=Column(String(128), primary_key=True))
    failures: int = Field(default=0, sa_column=Column(Integer, nullable=False))
    window_ends_at: datetime = moment(nullable=False)


class KeptAnswer(Row, table=True):
    """The answer to a creation that named an idempotency key, kept to be given again."""

    __tablename__ = "kept_answers"
    __table_args__ = (Index("ix_kept_answers_age", "expires_at"),)
    principal: str = Field(sa_column=Column(String(128), primary_key=True))
    key: str = Field(sa_column=Column(String(255), primary_key=True))
    request_sha256: str = Field(sa_column=Column(String(64), nullable=False))
    status: int = Field(sa_column=Column(Integer, nullable=False))
    body: str = long_text(nullable=False)
    expires_at: datetime = moment(nullable=False)
