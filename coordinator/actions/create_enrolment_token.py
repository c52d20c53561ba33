"""A token that lets machines become runners."""

import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.access_tables import EnrolmentToken
from coordinator.actions.register_runner import ENROLMENT_PREFIX, label_faults, secret_hash
from coordinator.errors import Denied, Invalid
from coordinator.rules.access import Caller
from coordinator.store import audit, enrolments, tenants
from shared.faults import Fault
from shared.ids import new_id
from shared.references import InvalidReference, display_name


def create_enrolment_token(
    tx: Session,
    caller: Caller,
    *,
    name: str,
    labels: Sequence[str] | None,
    max_uses: int,
    lifetime: timedelta,
    shared: bool,
    now: datetime,
) -> tuple[EnrolmentToken, str, str | None]:
    """Make the token and show it, this once; the account that its runners serve comes with it.

    `labels` are those that its runners may have, None for any. Runners of a `shared` one serve every tenant.
    """
    _require_valid(name, labels)
    tenant_id = _tenant_of(caller, shared=shared)
    secret = ENROLMENT_PREFIX + secrets.token_urlsafe(32)
    token = EnrolmentToken(
        id=new_id(),
        tenant_id=tenant_id,
        name=display_name(name, maximum=100),
        token_hash=secret_hash(secret),
        labels=None if labels is None else sorted(set(labels)),
        max_uses=max_uses,
        created_at=now,
        expires_at=now + lifetime,
    )
    enrolments.insert_token(tx, token)
    audit.record(
        tx,
        caller,
        "enrolment.created",
        now=now,
        tenant_id=tenant_id,
        enrolmentTokenId=token.id,
        name=token.name,
        labels=token.labels,
        maxUses=max_uses,
    )
    return token, secret, None if tenant_id is None else tenants.get_account(tx, tenant_id)


def _require_valid(name: str, labels: Sequence[str] | None) -> None:
    faults = label_faults(labels or ())
    try:
        display_name(name, maximum=100)
    except InvalidReference as error:
        faults.insert(0, Fault("name", str(error)))
    if faults:
        raise Invalid("the enrolment token is not valid", details=tuple(faults))


def _tenant_of(caller: Caller, *, shared: bool) -> str | None:
    """None for what serves every tenant, which only who speaks of none may make."""
    if shared:
        if not caller.sees_all_tenants:
            raise Denied("runners that serve every tenant are enrolled by the operator, who names no tenant")
        return None
    if caller.tenant_id is None:
        raise Invalid(
            "name the tenant in the header X-Tenant-ID, or make the token shared",
            details=(Fault("X-Tenant-ID", "is required unless shared is true"),),
        )
    return caller.tenant_id
