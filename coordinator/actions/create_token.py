"""A program gets a token of its own."""

import secrets
from collections.abc import Collection
from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.access_tables import ApiToken
from coordinator.actions.register_runner import secret_hash
from coordinator.errors import Denied, Invalid
from coordinator.rules.access import Caller
from coordinator.rules.permissions import GRANTABLE
from coordinator.store import accounts, audit, tenants
from shared.faults import Fault
from shared.ids import new_id
from shared.references import InvalidReference, display_name

PREFIX = "bmt_"
MAX_LIFETIME = timedelta(days=366)


def create_token(
    tx: Session,
    caller: Caller,
    *,
    name: str,
    permissions: Collection[str],
    lifetime: timedelta,
    now: datetime,
) -> tuple[ApiToken, str]:
    """Make the token and show it, this once. It can never do more than who made it.

    One that a program makes for another counts no longer than the program's own.
    """
    tenant_id = tenant_of(tx, caller)
    try:
        name = display_name(name, maximum=100)
    except InvalidReference as error:
        raise Invalid("the token is not valid", details=(Fault("name", str(error)),)) from error
    _require_known(permissions)
    _require_held(caller, tenant_id, permissions)
    secret = PREFIX + secrets.token_urlsafe(32)
    token = ApiToken(
        id=new_id(),
        tenant_id=tenant_id,
        user_id=caller.user_id,
        name=name,
        token_hash=secret_hash(secret),
        permissions=sorted(set(permissions)),
        created_at=now,
        expires_at=_end_of(caller, now + lifetime),
    )
    accounts.insert_token(tx, token)
    audit.record(
        tx,
        caller,
        "token.created",
        now=now,
        tenant_id=tenant_id,
        tokenId=token.id,
        name=name,
        permissions=token.permissions,
    )
    return token, secret


def _end_of(caller: Caller, wanted: datetime) -> datetime:
    is_program = caller.credential.startswith("token:")
    return min(wanted, caller.expires_at) if is_program and caller.expires_at is not None else wanted


def tenant_of(tx: Session, caller: Caller) -> str:
    """The tenant that the request is about, which the operator has to name."""
    if caller.tenant_id is None:
        raise Invalid("the header X-Tenant-ID is required", details=(Fault("X-Tenant-ID", "is required"),))
    return tenants.get_tenant(tx, caller, caller.tenant_id).id


def _require_known(permissions: Collection[str]) -> None:
    faults = tuple(
        Fault(f"permissions[{index}]", "is no permission that a token can have")
        for index, permission in enumerate(permissions)
        if permission not in GRANTABLE
    )
    if faults:
        raise Invalid("the token is not valid", details=faults)


def _require_held(caller: Caller, tenant_id: str, permissions: Collection[str]) -> None:
    missing = sorted(permission for permission in permissions if not caller.may(permission, tenant_id))
    if missing:
        raise Denied(f"a token cannot have what its maker has not: {', '.join(missing)}")
