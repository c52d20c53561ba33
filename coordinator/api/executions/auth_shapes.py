"""The wire models of logins."""

from typing import Annotated

from pydantic import Field

from coordinator.access_tables import User
from coordinator.actions.log_in import OpenedLogin
from coordinator.actions.show_account import AccountView
from coordinator.api.executions.shapes import Input, Shape
from shared.clock import to_wire

Password = Annotated[str, Field(min_length=1, max_length=1024, repr=False, description="The password")]


class LoginIn(Input):
    """Who logs in."""

    email: Annotated[str, Field(min_length=1, max_length=254, description="E-mail address of the user")]
    password: Password


class RefreshIn(Input):
    """A login that is to go on."""

    refresh_token: Annotated[
        str, Field(min_length=1, max_length=256, repr=False, description="The latest refresh token")
    ]


class LogoutIn(Input):
    """What ends."""

    everywhere: Annotated[bool, Field(description="End all logins of this user")] = False


class PasswordIn(Input):
    """Another password."""

    current_password: Password
    new_password: Annotated[
        str, Field(min_length=12, max_length=256, repr=False, description="The new password")
    ]


class UserOut(Shape):
    """A user."""

    id: str
    email: str
    name: str | None = None
    is_admin: bool


class TenantOfLogin(Shape):
    """A tenant that a user belongs to."""

    id: str
    name: str
    role: str


class LoginOut(Shape):
    """What a login opens."""

    token: str
    token_type: str = "Bearer"  # noqa: S105 - a word, no secret
    expires_at: str
    refresh_token: str
    user: UserOut
    tenants: list[TenantOfLogin]


class TenantOfCaller(Shape):
    """A tenant and what the caller may do there."""

    id: str
    name: str
    role: str | None = None
    permissions: list[str]


class AccountOut(Shape):
    """Who the caller is."""

    user: UserOut | None = None
    is_operator: bool
    tenants: list[TenantOfCaller]


def user_out(user: User) -> UserOut:
    return UserOut(id=user.id, email=user.email, name=user.name or None, is_admin=user.is_admin)


def login_out(opened: OpenedLogin) -> LoginOut:
    return LoginOut(
        token=opened.token,
        expires_at=to_wire(opened.expires_at),
        refresh_token=opened.refresh_token,
        user=user_out(opened.user),
        tenants=[TenantOfLogin(id=row.id, name=row.account, role=row.role) for row in opened.memberships],
    )


def account_out(view: AccountView) -> AccountOut:
    return AccountOut(
        user=user_out(view.user) if view.user is not None else None,
        is_operator=view.is_operator,
        tenants=[
            TenantOfCaller(id=tenant_id, name=name, role=role, permissions=permissions)
            for tenant_id, name, role, permissions in view.tenants
        ],
    )
