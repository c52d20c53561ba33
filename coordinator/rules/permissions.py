"""What each role may do. docs/security.md shows the same table, and a test compares the two."""

from enum import StrEnum


class Role(StrEnum):
    """What a member of a tenant is; each may all that those before it may."""

    VIEWER = "viewer"
    DEVELOPER = "developer"
    ADMIN = "admin"
    OWNER = "owner"


_VIEWER = frozenset(
    {
        "account:read",
        "build:list",
        "build:read",
        "image:list",
        "project:list",
        "project:read",
        "step:read",
        "ticket:create",
        "workflow:list",
        "workflow:read",
    }
)
_DEVELOPER = _VIEWER | {
    "build:cancel",
    "build:create",
    "build:delete",
    "build:retry",
    "image:create",
    "runner:list",
    "secret:list",
    "step:complete",
    "token:create",
    "token:delete",
    "token:list",
    "workflow:change",
    "workflow:create",
    "workflow:delete",
}
_ADMIN = _DEVELOPER | {
    "audit:read",
    "enrolment:create",
    "enrolment:delete",
    "enrolment:list",
    "image:delete",
    "member:delete",
    "member:list",
    "member:set",
    "project:change",
    "project:create",
    "project:delete",
    "runner:delete",
    "runner:rotate",
    "secret:delete",
    "secret:set",
}
_OWNER = _ADMIN

PERMISSIONS: dict[Role, frozenset[str]] = {
    Role.VIEWER: _VIEWER,
    Role.DEVELOPER: _DEVELOPER,
    Role.ADMIN: _ADMIN,
    Role.OWNER: _OWNER,
}
# What concerns all tenants: no role has these, the operator of the installation does.
OF_THE_OPERATOR = frozenset(
    {
        "metrics:read",
        "tenant:create",
        "tenant:list",
        "user:change",
        "user:create",
        "user:list",
    }
)
GRANTABLE = _OWNER


def permissions_of(role: str) -> frozenset[str]:
    """The permissions of a role; none for a word that is no role of this version."""
    try:
        return PERMISSIONS[Role(role)]
    except ValueError:
        return frozenset()


def may_give(giver: str | None, role: Role) -> bool:
    """Whether a member of role `giver` may make somebody `role`; None is the operator."""
    if giver is None or giver == Role.OWNER:
        return True
    return giver == Role.ADMIN and role is not Role.OWNER
