"""How often logins have failed lately. Each try is counted before its password is looked at.

A try that succeeds is given back. So a hundred tries at once are a hundred counts, and none slips through
while the others are being compared.
"""

import math
from datetime import datetime

from sqlalchemy import case, delete, literal, or_, select, update
from sqlmodel import Session

from coordinator.access_tables import LoginCount
from coordinator.errors import TooMany
from coordinator.rules.login_limits import LoginLimits
from coordinator.store.dialect import insert_or_change
from coordinator.tables import table_of

COUNTS = table_of(LoginCount)
AT_ONCE = 1000


def reserve_try(tx: Session, *, account_key: str, peer_key: str, now: datetime, limits: LoginLimits) -> None:
    """Count one login as failed, or TooMany until the window ends; commit this before comparing passwords."""
    # always in this order: of two transactions none holds what the other waits for
    _count(tx, account_key, limits.per_account, now, limits)
    _count(tx, peer_key, limits.per_peer, now, limits)


def forgive(tx: Session, *, account_key: str, peer_key: str) -> None:
    """The login that was counted has succeeded: the account begins anew, the peer had one failure less."""
    tx.connection().execute(delete(COUNTS).where(COUNTS.c.key == account_key))
    of_peer = update(COUNTS).where(COUNTS.c.key == peer_key, COUNTS.c.failures > 0)
    tx.connection().execute(of_peer.values(failures=COUNTS.c.failures - 1))


def delete_old_counts(tx: Session, *, now: datetime, at_once: int = AT_ONCE) -> int:
    """Delete some windows that have ended; returns how many."""
    has_ended = COUNTS.c.window_ends_at <= now
    some = select(COUNTS.c.key).where(has_ended).order_by(COUNTS.c.window_ends_at).limit(at_once)
    # asked again of each row: a new window may have begun in it meanwhile
    return tx.connection().execute(delete(COUNTS).where(COUNTS.c.key.in_(some), has_ended)).rowcount


def _count(tx: Session, key: str, limit: int, now: datetime, limits: LoginLimits) -> None:
    ends_at = now + limits.window
    has_ended = COUNTS.c.window_ends_at <= now
    new_end = literal(ends_at, COUNTS.c.window_ends_at.type)
    change = {
        "failures": case((has_ended, 1), else_=COUNTS.c.failures + 1),
        "window_ends_at": case((has_ended, new_end), else_=COUNTS.c.window_ends_at),
    }
    row = {"key": key, "failures": 1, "window_ends_at": ends_at}
    if insert_or_change(tx, COUNTS, row, change, only_if=or_(has_ended, COUNTS.c.failures < limit)):
        return
    known = tx.connection().execute(select(COUNTS.c.window_ends_at).where(COUNTS.c.key == key)).scalar()
    wait = max(1, math.ceil(((known or ends_at) - now).total_seconds()))
    raise TooMany("too many logins have failed; come back later", retry_after_s=wait)
