"""A login goes on: its refresh token is exchanged for the next one and a fresh access token."""

from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.actions.log_in import OpenedLogin, as_user, opened
from coordinator.actions.register_runner import secret_hash
from coordinator.errors import CoordinatorError, Unauthenticated
from coordinator.rules.refresh_tokens import following, login_of
from coordinator.site import Site
from coordinator.store import accounts, audit

# So long the answer may have been lost, or two windows of one browser may have asked at once.
GRACE = timedelta(seconds=30)
_NOT_KNOWN = "this refresh token is not known"


def refresh_login(
    tx: Session, site: Site, refresh_token: str, *, address: str, now: datetime
) -> OpenedLogin | CoordinatorError:
    """The next tokens of the login. Who shows one that was replaced long ago has stolen it: the login ends.

    So does who shows one of still earlier: the thief may be the other one, who has been quick twice. The
    refusal is returned, not raised, as what it has ended has to stay ended.
    """
    login_id = login_of(site.lease_key, refresh_token)
    login = accounts.find_login(tx, login_id) if login_id is not None else None
    if login is None:
        return Unauthenticated(_NOT_KNOWN)
    user = accounts.get_user(tx, login.user_id)
    is_over = login.ended_at is not None or login.expires_at <= now
    if is_over or user.disabled_at is not None or user.token_version != login.token_version:
        return Unauthenticated(_NOT_KNOWN)
    shown = secret_hash(refresh_token)
    is_current = shown == login.refresh_hash
    is_in_time = shown == login.former_refresh_hash and now - login.refreshed_at <= GRACE
    if not is_current and not is_in_time:
        accounts.end_login(tx, login.id, now=now)
        audit.record(tx, as_user(user, address), "login.reused", now=now, loginId=login.id)
        return Unauthenticated(_NOT_KNOWN)
    # asked again in time: the answer is the one that was lost, or that the other window got
    fresh = following(site.lease_key, refresh_token)
    if is_current and not accounts.replace_refresh(tx, login, secret_hash(fresh), now=now):
        return Unauthenticated(_NOT_KNOWN)
    return opened(tx, site, user, login, fresh, now=now)
