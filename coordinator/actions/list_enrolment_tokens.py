"""The enrolment tokens of a tenant."""

from sqlmodel import Session

from coordinator.access_tables import EnrolmentToken
from coordinator.rules.access import Caller
from coordinator.store import enrolments, tenants

SHOWN = 1000


def list_enrolment_tokens(tx: Session, caller: Caller) -> list[tuple[EnrolmentToken, str | None]]:
    """The newest tokens, also those that do not count any more, each with its account unless it is shared."""
    if caller.tenant_id is None and not caller.sees_all_tenants:
        return []
    found = enrolments.list_tokens(tx, caller.tenant_id, limit=SHOWN)
    accounts = tenants.list_accounts(tx, {token.tenant_id for token in found if token.tenant_id is not None})
    return [(token, accounts.get(token.tenant_id or "")) for token in found]
