"""Values that were replaced or deleted go for good once no running attempt has them."""

from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.store import project_secrets

# A claim that was made in the same moment writes down what it was given a little later.
GRACE = timedelta(seconds=60)
AT_ONCE = 1000


def forget_secrets(tx: Session, *, now: datetime) -> int:
    """How many rows went."""
    return project_secrets.delete_unused(tx, retired_before=now - GRACE, limit=AT_ONCE)
