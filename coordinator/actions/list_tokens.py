"""The tokens of programs in a tenant."""

from sqlmodel import Session

from coordinator.access_tables import ApiToken
from coordinator.actions.create_token import tenant_of
from coordinator.rules.access import Caller
from coordinator.store import accounts


def list_tokens(tx: Session, caller: Caller, *, limit: int, offset: int) -> list[ApiToken]:
    """One's own; all of them for who may say who belongs to the tenant."""
    tenant_id = tenant_of(tx, caller)
    whose = None if caller.may("member:set", tenant_id) else caller.user_id or ""
    return accounts.list_tokens(tx, tenant_id, user_id=whose, limit=limit, offset=offset)
