"""From a user's credential to what it may do, and from the tenant header to the tenant it is about."""

import hmac
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from sqlmodel import Session

from coordinator.actions.create_token import PREFIX as API_TOKEN_PREFIX
from coordinator.actions.register_runner import secret_hash
from coordinator.api.state import AppState
from coordinator.errors import Denied, Invalid, Unauthenticated
from coordinator.rules.access import Audience, Caller, Policy, Scope
from coordinator.rules.permissions import permissions_of
from coordinator.store import identities
from coordinator.store.identities import KnownToken, KnownUser
from shared.faults import Fault

CACHE_S = 5.0
MAX_CACHED = 10_000
TENANT_HEADER = "X-Tenant-ID"
OPERATOR = "admin"
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_NIL = "00000000-0000-0000-0000-000000000000"
_NOT_KNOWN = "this token is not known"


@dataclass(frozen=True)
class Identity:
    """Whom a credential stands for: `grants` None is everything, everywhere.

    `credential` names it without opening anything: `login:<id>`, `token:<id>` or `admin`.
    """

    actor: str
    credential: str
    user_id: str | None
    grants: Mapping[str, frozenset[str]] | None
    expires_at: datetime | None = None


class Identities:
    """Looks credentials up; what was found counts for at most 5 seconds, or until something changes here."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._known: dict[str, tuple[Identity, float]] = {}
        self._version = state.rights.version

    async def of_token(self, token: str) -> Identity:
        """Whom a bearer token stands for, or Unauthenticated."""
        if hmac.compare_digest(token.encode(), self._state.credentials.admin_token.encode()):
            return _THE_OPERATOR
        now = self._state.clock()
        if token.startswith(API_TOKEN_PREFIX):
            digest = secret_hash(token)
            return await self._find(
                digest.hex(), lambda tx: _token_identity(identities.find_token(tx, digest, now=now))
            )
        if token.count(".") != 2:
            raise Unauthenticated(_NOT_KNOWN)
        said = self._state.site.access_tokens.verify(token, now=now)
        found = await self._of_login(said.login_id, said.user_id)
        return replace(found, expires_at=said.expires_at)

    async def of_credential(self, credential: str, user_id: str | None) -> Identity:
        """Whom a credential that was let in before stands for now, or Unauthenticated."""
        if credential == OPERATOR:
            return _THE_OPERATOR
        kind, _, its_id = credential.partition(":")
        if kind == "login" and user_id is not None:
            return await self._of_login(its_id, user_id)
        now = self._state.clock()
        return await self._find(
            credential, lambda tx: _token_identity(identities.find_token_by_id(tx, its_id, now=now))
        )

    async def _of_login(self, login_id: str, user_id: str) -> Identity:
        now = self._state.clock()

        def look(tx: Session) -> Identity | None:
            user = identities.find_login_user(tx, login_id, user_id, now=now)
            return _user_identity(user, f"login:{login_id}") if user is not None else None

        return await self._find(f"login:{login_id} {user_id}", look)

    async def _find(self, name: str, look: Callable[[Session], Identity | None]) -> Identity:
        if self._version != self._state.rights.version:
            self._known.clear()
            self._version = self._state.rights.version
        known = self._known.get(name)
        if known is not None and known[1] > time.monotonic() and not self._has_expired(known[0]):
            return known[0]
        version = self._version
        found = await self._state.lanes.read(look)
        if found is None:
            self._known.pop(name, None)
            raise Unauthenticated(_NOT_KNOWN)
        if version == self._state.rights.version:  # else it may have been looked up before the change
            if len(self._known) >= MAX_CACHED:
                self._known.clear()
            self._known[name] = (found, time.monotonic() + CACHE_S)
        return found

    def _has_expired(self, identity: Identity) -> bool:
        return identity.expires_at is not None and identity.expires_at <= self._state.clock()


def _user_identity(user: KnownUser, credential: str) -> Identity:
    grants = {tenant_id: permissions_of(role) for tenant_id, role in user.roles.items()}
    return Identity(f"user:{user.user_id}", credential, user.user_id, None if user.is_admin else grants)


def _token_identity(token: KnownToken | None) -> Identity | None:
    """A token can do what it was made for, and never more than the user it acts for."""
    if token is None:
        return None
    permissions = token.permissions
    if token.user is not None and not token.user.is_admin:
        permissions &= permissions_of(token.user.roles.get(token.tenant_id, ""))
    return Identity(
        f"token:{token.token_id}",
        f"token:{token.token_id}",
        token.user.user_id if token.user is not None else None,
        {token.tenant_id: permissions},
        token.expires_at,
    )


def caller_of(identity: Identity, policy: Policy, tenant_id: str | None, address: str) -> Caller:
    """The caller of a route: Denied where it may not what the route is for.

    `tenant_id` is what the header says, None without one.
    """
    caller = Caller(
        actor=identity.actor,
        audience=Audience.USER,
        address=address,
        user_id=identity.user_id,
        grants=identity.grants,
        permission=policy.permission,
        credential=identity.credential,
        expires_at=identity.expires_at,
    )
    if policy.scope is Scope.INSTALLATION:
        if not caller.is_operator:
            raise Denied(f"this needs the permission {policy.permission}, which only the operator has")
        return caller
    if policy.scope is Scope.NOTHING:
        return caller
    chosen = tenant_id or _only_tenant(identity, policy.scope)
    if chosen is None:
        return _somewhere(caller)
    if identity.grants is not None and chosen not in identity.grants:
        raise Denied("you are not a member of this tenant")
    caller = replace(caller, tenant_id=chosen)
    caller.require_in(chosen)
    return caller


def name_caller(error: Denied, identity: Identity, tenant_id: str | None) -> None:
    """Say in a refusal who was refused, and in which of its own tenants."""
    mine = list(identity.grants or ())
    error.actor = identity.actor
    error.tenant_id = tenant_id if tenant_id in mine else mine[0] if len(mine) == 1 else None


def _only_tenant(identity: Identity, scope: Scope) -> str | None:
    """The tenant of who belongs to one; None where what is named has to decide, or for the operator."""
    if identity.grants is None:
        return None
    if len(identity.grants) == 1:
        return next(iter(identity.grants))
    if scope is Scope.TENANT and identity.grants:
        raise _bad_header("is required of members of several tenants")
    return None


def _somewhere(caller: Caller) -> Caller:
    """Who may it in no tenant at all is turned away before anything is looked for."""
    if caller.grants is not None and not any(caller.may(caller.permission, one) for one in caller.grants):
        raise Denied(f"this needs the permission {caller.permission}")
    return caller


def tenant_header(headers: Sequence[tuple[bytes, bytes]], *, is_required: bool) -> str | None:
    """The tenant that a request names; Invalid for none where one is needed, for several, for no id."""
    values = [value for name, value in headers if name == b"x-tenant-id"]
    if not values:
        if is_required:
            raise _bad_header("is required")
        return None
    if len(values) > 1:
        raise _bad_header("must be sent once")
    text = values[0].decode("latin-1").lower()
    if _UUID.fullmatch(text) is None:
        raise _bad_header("must be the UUID of a tenant")
    if text == _NIL:
        raise _bad_header("must not be the nil UUID")
    return text


def _bad_header(reason: str) -> Invalid:
    return Invalid(f"the header {TENANT_HEADER} {reason}", details=(Fault(TENANT_HEADER, reason),))


_THE_OPERATOR = Identity(OPERATOR, OPERATOR, None, None)
