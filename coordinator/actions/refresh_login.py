"""A login goes on: its refresh token is exchanged for the next one and a fresh access token."""

import base64
import hashlib
import hmac
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
    fresh = _next(site, refresh_token)
    if not is_current:  # asked again: the answer is the one that was lost, or that the other window got
        is_same = hmac.compare_digest(secret_hash(fresh), login.refresh_hash)
    else:
        is_same = accounts.replace_refresh(tx, login, secret_hash(fresh), now=now)
    return opened(tx, site, user, login, fresh, now=now) if is_same else Unauthenticated(_NOT_KNOWN)


def _next(site: Site, refresh_token: str) -> str:
    """The one token that follows this one, which nobody but us can tell.

    Were there two, a thief and the user could each go on with one of them, and neither would be missed.
    """
    digest = hmac.digest(site.lease_key, b"refresh token\0" + refresh_token.encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
