"""A user logs in: what is stored is looked up, compared elsewhere, and then a login is opened."""

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.access_tables import LoginSession, User
from coordinator.actions.register_runner import secret_hash
from coordinator.errors import Unauthenticated
from coordinator.rules.access import Audience, Caller
from coordinator.rules.login_limits import LoginLimits, account_key, peer_key
from coordinator.rules.names import canonical_email
from coordinator.rules.refresh_tokens import token_of
from coordinator.settings import Settings
from coordinator.site import Site
from coordinator.store import accounts, audit
from coordinator.store.login_counts import forgive, reserve_try
from shared.ids import new_id

WRONG = "the address or the password is wrong"


@dataclass(frozen=True)
class OpenedLogin:
    """What a login answers: the tokens, shown this once, and whose they are."""

    token: str
    expires_at: datetime
    refresh_token: str
    user: User
    memberships: list[Any]


def begin_login(
    tx: Session, site: Site, email: str, *, address: str, now: datetime
) -> tuple[str | None, str | None]:
    """The id and the stored password of the user with this address; both None for nobody who may log in.

    Until the login has succeeded it counts as a failed one, of the account and of the peer.
    """
    count_try(tx, site, email, address=address, now=now)
    canonical = canonical_email(email)
    user = accounts.find_user(tx, canonical) if canonical is not None else None
    if user is None or user.disabled_at is not None:
        return None, None
    return user.id, user.password_hash


def log_in(
    tx: Session, site: Site, user_id: str, password_hash: str, *, address: str, now: datetime
) -> OpenedLogin:
    """Open a login for who has shown the password that is stored, if it still is."""
    user = accounts.get_user(tx, user_id)
    if user.disabled_at is not None or user.password_hash != password_hash:
        raise Unauthenticated(WRONG)
    login_id = new_id()
    refresh_token = token_of(site.lease_key, login_id, secrets.token_urlsafe(32))
    login = LoginSession(
        id=login_id,
        user_id=user.id,
        refresh_hash=secret_hash(refresh_token),
        token_version=user.token_version,
        created_at=now,
        refreshed_at=now,
        expires_at=now + timedelta(days=site.settings.login_days),
    )
    accounts.insert_login(tx, login)
    forgive_try(tx, user.email, address=address)
    audit.record(tx, as_user(user, address), "login.opened", now=now, loginId=login.id)
    return opened(tx, site, user, login, refresh_token, now=now)


def count_try(tx: Session, site: Site, email: str, *, address: str, now: datetime) -> None:
    """Count a password that is about to be compared as wrong, or TooMany."""
    keys = {"account_key": account_key(email), "peer_key": peer_key(address)}
    reserve_try(tx, **keys, now=now, limits=_limits(site.settings))


def forgive_try(tx: Session, email: str, *, address: str) -> None:
    """It was right."""
    forgive(tx, account_key=account_key(email), peer_key=peer_key(address))


def _limits(settings: Settings) -> LoginLimits:
    window = timedelta(minutes=settings.login_window_minutes)
    return LoginLimits(settings.login_failures, settings.login_failures_peer, window)


def opened(
    tx: Session, site: Site, user: User, login: LoginSession, refresh_token: str, *, now: datetime
) -> OpenedLogin:
    """A fresh access token for this login, and all that is shown with it."""
    lifetime = timedelta(minutes=site.settings.access_token_minutes)
    token, expires_at = site.access_tokens.sign(
        user.id, login.id, now=now, lifetime=min(lifetime, login.expires_at - now)
    )
    return OpenedLogin(token, expires_at, refresh_token, user, accounts.list_memberships(tx, user.id))


def as_user(user: User, address: str) -> Caller:
    """Who is written down for what a user does before it has a token."""
    return Caller(
        actor=f"user:{user.id}", audience=Audience.USER, address=address, user_id=user.id, grants={}
    )
