"""A login goes on: its refresh token is exchanged for the next one and a fresh access token."""

import secrets
from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.actions.log_in import OpenedLogin, as_user, opened
from coordinator.actions.register_runner import secret_hash
from coordinator.errors import CoordinatorError, Unauthenticated
from coordinator.site import Site
from coordinator.store import accounts, audit

# So long the answer may have been lost, or two windows of one browser may have asked at once.
GRACE = timedelta(seconds=30)
_NOT_KNOWN = "this refresh token is not known"


def refresh_login(
    tx: Session, site: Site, refresh_token: str, *, address: str, now: datetime
) -> OpenedLogin | CoordinatorError:
    """The next tokens of the login. Who shows one that was replaced long ago has stolen it: the login ends.

    The refusal is returned, not raised, as what it has ended has to stay ended.
    """
    found = accounts.find_login_by_refresh(tx, secret_hash(refresh_token))
    if found is None:
        return Unauthenticated(_NOT_KNOWN)
    login, is_current = found
    user = accounts.get_user(tx, login.user_id)
    is_over = login.ended_at is not None or login.expires_at <= now
    if is_over or user.disabled_at is not None or user.token_version != login.token_version:
        return Unauthenticated(_NOT_KNOWN)
    if not is_current and now - login.refreshed_at > GRACE:
        accounts.end_login(tx, login.id, now=now)
        audit.record(tx, as_user(user, address), "login.reused", now=now, loginId=login.id)
        return Unauthenticated(_NOT_KNOWN)
    fresh = secrets.token_urlsafe(32)
    if not accounts.replace_refresh(tx, login, secret_hash(fresh), now=now):
        return Unauthenticated(_NOT_KNOWN)
    return opened(tx, site, user, login, fresh, now=now)
