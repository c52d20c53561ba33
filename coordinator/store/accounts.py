"""Users, their memberships, their logins and the tokens of programs."""

from datetime import datetime
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.engine import Row
from sqlmodel import Session, col
from sqlmodel import select as select_rows

from coordinator.access_tables import ApiToken, LoginSession, Membership, User
from coordinator.errors import NotFound
from coordinator.store.dialect import insert_if_absent
from coordinator.tables import Tenant, table_of

USERS = table_of(User)
LOGINS = table_of(LoginSession)
MEMBERSHIPS = table_of(Membership)
TENANTS = table_of(Tenant)
TOKENS = table_of(ApiToken)
_OWNER = "owner"


def insert_user(tx: Session, user: User) -> bool:
    """False when the address is taken."""
    return insert_if_absent(tx, USERS, user.model_dump())


def find_user(tx: Session, email: str) -> User | None:
    return tx.exec(select_rows(User).where(col(User.email) == email)).one_or_none()


def get_user(tx: Session, user_id: str) -> User:
    user = tx.get(User, user_id)
    if user is None:
        raise NotFound("no such user")
    return user


def lock_user(tx: Session, user_id: str) -> User:
    """The user as it is now, held until the transaction ends: of two changes the second sees the first."""
    statement = select_rows(User).where(col(User.id) == user_id).with_for_update()
    user = tx.exec(statement.execution_options(populate_existing=True)).one_or_none()
    if user is None:
        raise NotFound("no such user")
    return user


def list_users(tx: Session, *, limit: int, offset: int) -> list[User]:
    statement = select_rows(User).order_by(col(User.id)).limit(limit).offset(offset)
    return list(tx.exec(statement).all())


def call_back_tokens(tx: Session, user_id: str, *, now: datetime) -> None:
    """Every access and refresh token that this user was given stops to count."""
    statement = update(USERS).where(USERS.c.id == user_id)
    tx.connection().execute(statement.values(token_version=USERS.c.token_version + 1, updated_at=now))
    still = update(LOGINS).where(LOGINS.c.user_id == user_id, LOGINS.c.ended_at.is_(None))
    tx.connection().execute(still.values(ended_at=now))


# Memberships


def list_memberships(tx: Session, user_id: str) -> list[Row[Any]]:
    """The tenants of a user by account: `id`, `account`, `role`."""
    statement = (
        select(TENANTS.c.id, TENANTS.c.account, MEMBERSHIPS.c.role)
        .join(TENANTS, TENANTS.c.id == MEMBERSHIPS.c.tenant_id)
        .where(MEMBERSHIPS.c.user_id == user_id)
        .order_by(TENANTS.c.account)
    )
    return [*tx.connection().execute(statement)]


def list_members(tx: Session, tenant_id: str) -> list[Row[Any]]:
    """The members of a tenant by address: `user_id`, `email`, `name`, `role`, `created_at`, `disabled_at`."""
    statement = (
        select(
            MEMBERSHIPS.c.user_id,
            USERS.c.email,
            USERS.c.name,
            MEMBERSHIPS.c.role,
            MEMBERSHIPS.c.created_at,
            USERS.c.disabled_at,
        )
        .join(USERS, USERS.c.id == MEMBERSHIPS.c.user_id)
        .where(MEMBERSHIPS.c.tenant_id == tenant_id)
        .order_by(USERS.c.email)
    )
    return [*tx.connection().execute(statement)]


def find_role(tx: Session, tenant_id: str, user_id: str) -> str | None:
    membership = tx.get(Membership, (tenant_id, user_id))
    return membership.role if membership else None


def set_role(tx: Session, tenant_id: str, user_id: str, role: str, *, now: datetime) -> None:
    row = {"tenant_id": tenant_id, "user_id": user_id, "role": role, "created_at": now}
    if not insert_if_absent(tx, MEMBERSHIPS, row):
        its = (MEMBERSHIPS.c.tenant_id == tenant_id, MEMBERSHIPS.c.user_id == user_id)
        tx.connection().execute(update(MEMBERSHIPS).where(*its).values(role=role))


def delete_membership(tx: Session, tenant_id: str, user_id: str) -> None:
    its = (MEMBERSHIPS.c.tenant_id == tenant_id, MEMBERSHIPS.c.user_id == user_id)
    tx.connection().execute(MEMBERSHIPS.delete().where(*its))


def count_other_owners(tx: Session, tenant_id: str, user_id: str) -> int:
    """How many owners besides this user a tenant has that may log in."""
    statement = (
        select(func.count())
        .select_from(MEMBERSHIPS.join(USERS, USERS.c.id == MEMBERSHIPS.c.user_id))
        .where(
            MEMBERSHIPS.c.tenant_id == tenant_id,
            MEMBERSHIPS.c.user_id != user_id,
            MEMBERSHIPS.c.role == _OWNER,
            USERS.c.disabled_at.is_(None),
        )
    )
    return int(tx.connection().execute(statement).scalar_one())


# Logins


def insert_login(tx: Session, login: LoginSession) -> None:
    tx.add(login)
    tx.flush()


def find_login(tx: Session, login_id: str) -> LoginSession | None:
    """The login of this id, held."""
    statement = select_rows(LoginSession).where(col(LoginSession.id) == login_id)
    return tx.exec(statement.with_for_update()).first()


def replace_refresh(tx: Session, login: LoginSession, refresh_hash: bytes, *, now: datetime) -> bool:
    """The next refresh token; False when another request was quicker."""
    statement = (
        update(LOGINS)
        .where(
            LOGINS.c.id == login.id, LOGINS.c.refresh_hash == login.refresh_hash, LOGINS.c.ended_at.is_(None)
        )
        .values(refresh_hash=refresh_hash, former_refresh_hash=login.refresh_hash, refreshed_at=now)
    )
    return tx.connection().execute(statement).rowcount == 1


def end_login(tx: Session, login_id: str, *, now: datetime) -> bool:
    statement = update(LOGINS).where(LOGINS.c.id == login_id, LOGINS.c.ended_at.is_(None))
    return tx.connection().execute(statement.values(ended_at=now)).rowcount == 1


def delete_old_logins(tx: Session, before: datetime, *, limit: int) -> int:
    """Logins that ended or expired before this moment, so many at once."""
    over = select(LOGINS.c.id).where(LOGINS.c.expires_at < before).limit(limit)
    return tx.connection().execute(LOGINS.delete().where(LOGINS.c.id.in_(over))).rowcount


# Tokens of programs


def insert_token(tx: Session, token: ApiToken) -> None:
    tx.add(token)
    tx.flush()


def list_tokens(
    tx: Session, tenant_id: str, *, user_id: str | None, limit: int, offset: int
) -> list[ApiToken]:
    """The tokens of a tenant that were not revoked, oldest first; `user_id` narrows them to one user's."""
    statement = select_rows(ApiToken).where(
        col(ApiToken.tenant_id) == tenant_id, col(ApiToken.revoked_at).is_(None)
    )
    if user_id is not None:
        statement = statement.where(col(ApiToken.user_id) == user_id)
    return list(tx.exec(statement.order_by(col(ApiToken.id)).limit(limit).offset(offset)).all())


def find_token(tx: Session, token_id: str) -> ApiToken | None:
    return tx.get(ApiToken, token_id)


def revoke_tokens_of(tx: Session, tenant_id: str, user_id: str, *, now: datetime) -> int:
    """Every token that this user made in the tenant stops to count; returns how many did until now."""
    theirs = update(TOKENS).where(
        TOKENS.c.tenant_id == tenant_id, TOKENS.c.user_id == user_id, TOKENS.c.revoked_at.is_(None)
    )
    return tx.connection().execute(theirs.values(revoked_at=now)).rowcount


def revoke_all_tokens(tx: Session, user_id: str, *, now: datetime) -> int:
    """Every token that this user made anywhere stops to count; returns how many did until now."""
    theirs = update(TOKENS).where(TOKENS.c.user_id == user_id, TOKENS.c.revoked_at.is_(None))
    return tx.connection().execute(theirs.values(revoked_at=now)).rowcount


def revoke_token(tx: Session, token_id: str, *, now: datetime) -> bool:
    statement = update(TOKENS).where(TOKENS.c.id == token_id, TOKENS.c.revoked_at.is_(None))
    return tx.connection().execute(statement.values(revoked_at=now)).rowcount == 1
