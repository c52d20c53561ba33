"""An enrolment token lets nobody in any more."""

from datetime import datetime

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import audit, enrolments


def revoke_enrolment_token(tx: Session, caller: Caller, token_id: str, *, now: datetime) -> None:
    """The runners that came by it stay. Revoking again changes nothing."""
    token = enrolments.get_token(tx, caller, token_id)
    if token.tenant_id is not None:
        caller.require_in(token.tenant_id)
    if enrolments.revoke_token(tx, token.id, now=now):
        audit.record(
            tx,
            caller,
            "enrolment.revoked",
            now=now,
            tenant_id=token.tenant_id,
            enrolmentTokenId=token.id,
            name=token.name,
        )
