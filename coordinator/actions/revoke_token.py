"""A token stops to count."""

from datetime import datetime

from sqlmodel import Session

from coordinator.errors import Foreign, NotFound
from coordinator.rules.access import Caller
from coordinator.store import accounts, audit


def revoke_token(tx: Session, caller: Caller, token_id: str, *, now: datetime) -> None:
    """Revoke one's own token, or any of the tenant for who may say who belongs to it."""
    token = accounts.find_token(tx, token_id)
    if token is None:
        raise NotFound("no such token")
    if not caller.may_see_tenant(token.tenant_id):
        raise Foreign("no such token")
    caller.require_in(token.tenant_id)
    is_own = caller.user_id is not None and token.user_id == caller.user_id
    if not is_own and not caller.may("member:set", token.tenant_id):
        raise NotFound("no such token")
    if not accounts.revoke_token(tx, token.id, now=now):
        raise NotFound("no such token")
    audit.record(
        tx, caller, "token.revoked", now=now, tenant_id=token.tenant_id, tokenId=token.id, name=token.name
    )
