"""The wire models of tenants, users, members and tokens."""

from datetime import datetime
from typing import Annotated, Any

from pydantic import Field

from coordinator.access_tables import ApiToken, User
from coordinator.api.build_server.shapes import Input, Shape
from coordinator.api.endpoint import Query, QueryInt
from coordinator.rules.permissions import GRANTABLE, Role
from coordinator.tables import Tenant
from shared.clock import to_wire

NewPassword = Annotated[str, Field(min_length=12, max_length=256, description="12 to 256 characters")]


class PageQuery(Query):
    """A part of a list."""

    limit: Annotated[QueryInt, Field(ge=1, le=1000, description="How many at most")] = 100
    offset: Annotated[QueryInt, Field(ge=0, le=2**31, description="How many to leave out")] = 0


class TenantQuery(PageQuery):
    """Which tenants."""

    account: Annotated[str | None, Field(max_length=255, description="Only that of this account or id")] = (
        None
    )


class UserQuery(PageQuery):
    """Which users."""

    email: Annotated[str | None, Field(max_length=254, description="Only that of this address")] = None


class TenantIn(Input):
    """A new tenant."""

    account_id: Annotated[str, Field(min_length=1, max_length=255, description="Its account, unique")]


class TenantOut(Shape):
    """A tenant."""

    id: str
    account_id: str
    created_at: str


class UserIn(Input):
    """A new user. Without a password one is made up and shown in the answer."""

    email: Annotated[str, Field(min_length=3, max_length=254, description="E-mail address, plain ASCII")]
    name: Annotated[str, Field(max_length=100, description="Name to show")] = ""
    password: NewPassword | None = None
    is_admin: Annotated[bool, Field(description="Administers the whole installation")] = False


class UserPatch(Input):
    """What is to be otherwise."""

    name: Annotated[str, Field(max_length=100, description="Name to show")] | None = None
    password: NewPassword | None = None
    is_disabled: Annotated[bool, Field(description="May not log in")] | None = None
    is_admin: Annotated[bool, Field(description="Administers the whole installation")] | None = None


class UserOut(Shape):
    """A user; `password` only where it was made up for this answer."""

    id: str
    email: str
    name: str | None = None
    is_admin: bool
    is_disabled: bool
    created_at: str
    password: Annotated[str | None, Field(repr=False)] = None


class MemberIn(Input):
    """The role of a member."""

    role: Annotated[Role, Field(strict=False, description="What the member may do")]


class MemberOut(Shape):
    """A member of a tenant."""

    user_id: str
    email: str
    name: str | None = None
    role: str
    is_disabled: bool
    since: str


class TokenIn(Input):
    """A new token for a program."""

    name: Annotated[str, Field(min_length=1, max_length=100, description="What it is for")]
    permissions: Annotated[
        list[Annotated[str, Field(max_length=64, json_schema_extra={"enum": sorted(GRANTABLE)})]],
        Field(min_length=1, max_length=100, description="What it may do, at most what its maker may"),
    ]
    expires_in_seconds: Annotated[
        int, Field(ge=60, le=366 * 86400, description="Seconds until it stops to count")
    ] = 90 * 86400


class TokenOut(Shape):
    """A token; `token` itself only in the answer to its making."""

    id: str
    name: str
    tenant_id: str
    user_id: str | None = None
    permissions: list[str]
    created_at: str
    expires_at: str | None = None
    token: Annotated[str | None, Field(repr=False)] = None


def tenant_out(tenant: Tenant) -> TenantOut:
    return TenantOut(id=tenant.id, account_id=tenant.account, created_at=to_wire(tenant.created_at))


def user_out(user: User, password: str | None = None) -> UserOut:
    return UserOut(
        id=user.id,
        email=user.email,
        name=user.name or None,
        is_admin=user.is_admin,
        is_disabled=user.disabled_at is not None,
        created_at=to_wire(user.created_at),
        password=password,
    )


def member_out(row: Any) -> MemberOut:
    return MemberOut(
        user_id=row.user_id,
        email=row.email,
        name=row.name or None,
        role=row.role,
        is_disabled=row.disabled_at is not None,
        since=to_wire(row.created_at),
    )


def token_out(token: ApiToken, secret: str | None = None) -> TokenOut:
    return TokenOut(
        id=token.id,
        name=token.name,
        tenant_id=token.tenant_id,
        user_id=token.user_id,
        permissions=token.permissions,
        created_at=to_wire(token.created_at),
        expires_at=_maybe(token.expires_at),
        token=secret,
    )


def _maybe(moment: datetime | None) -> str | None:
    return to_wire(moment) if moment is not None else None
