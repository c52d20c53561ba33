"""From a credential to a Caller. Nothing else in a request says who is calling."""

import hmac
import time
from collections.abc import Sequence
from dataclasses import replace

from coordinator.actions.register_runner import ENROLMENT_PREFIX, secret_hash
from coordinator.actions.take_secret import use_secret
from coordinator.api.identify import Identities, Identity, caller_of, name_caller, tenant_header
from coordinator.api.state import AppState
from coordinator.errors import Denied, Revoked, Unauthenticated
from coordinator.rules.access import Audience, Caller, Policy, Scope
from coordinator.rules.enrolment import TokenState, state_of
from coordinator.store import enrolments
from coordinator.store.runners import find_runner_by_secret
from coordinator.store.tenants import has_tenant

Headers = Sequence[tuple[bytes, bytes]]

CACHE_S = 5.0
MAX_CACHED = 10_000
_MAX_TOKEN = 4096


class Doorkeeper:
    """Finds out who calls; a runner's secret is looked up again at the latest after 5 seconds."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self.identities = Identities(state)
        self._known: dict[bytes, tuple[str, float]] = {}
        self._version = state.rights.version

    async def admit(
        self, policy: Policy, headers: Headers, address: str, *, needs_credential: bool = False
    ) -> Caller:
        """The caller of a route, or Unauthenticated, Invalid for its tenant header, or Denied.

        `needs_credential`: also where access is open.
        """
        audience = policy.audience
        if audience is Audience.ANYONE:
            return Caller(actor="anyone", audience=audience, address=address)
        if audience is Audience.RUNNER:
            return await self._runner(headers, address)
        if audience is Audience.STEP and _has(headers, b"x-attempt"):
            return await self._runner(headers, address)
        if audience is Audience.ENROLMENT:
            return await self._enrolling(headers, address)
        if self._state.settings.auth == "open" and not needs_credential:
            local = Caller(actor="local", audience=Audience.USER, address=address)
            if policy.scope in (Scope.NOTHING, Scope.INSTALLATION):
                return local
            return await self._about(local, tenant_header(headers, is_required=False))
        identity = await self.identities.of_token(bearer_token(headers))
        tenant_id = tenant_header(headers, is_required=policy.scope is Scope.HEADER)
        return await self.recognise(identity, policy, tenant_id, address)

    async def recognise(
        self, identity: Identity, policy: Policy, tenant_id: str | None, address: str
    ) -> Caller:
        """The caller that somebody who is known is on a route, about the tenant that is named, or Denied."""
        try:
            caller = caller_of(identity, policy, tenant_id, address)
            is_about_one = policy.scope not in (Scope.NOTHING, Scope.INSTALLATION)
            return await self._about(caller, tenant_id) if caller.is_operator and is_about_one else caller
        except Denied as error:
            name_caller(error, identity, tenant_id)
            raise

    async def _about(self, caller: Caller, tenant_id: str | None) -> Caller:
        """The operator, who belongs to no tenant, speaks of the one that is named."""
        if tenant_id is None:
            return caller
        if not await self._state.lanes.read(lambda tx: has_tenant(tx, tenant_id)):
            raise Denied("you are not a member of this tenant")
        return replace(caller, tenant_id=tenant_id)

    async def _enrolling(self, headers: Headers, address: str) -> Caller:
        if self._state.settings.auth == "open" and not _has(headers, b"authorization"):
            return Caller(actor="local", audience=Audience.USER, address=address)
        token = bearer_token(headers)
        credentials = self._state.credentials
        if _equal(token, credentials.admin_token):
            return Caller(actor="admin", audience=Audience.USER, address=address)
        if _equal(token, credentials.registration_token):
            return Caller(actor="registration-token", audience=Audience.ENROLMENT, address=address)
        if token.startswith(ENROLMENT_PREFIX):
            return await self._enrolled_by(token, address)
        raise Unauthenticated("this token is not known")

    async def _enrolled_by(self, token: str, address: str) -> Caller:
        """Whether the token still counts is asked again when its use is."""
        digest = secret_hash(token)
        found = await self._state.lanes.read(lambda tx: enrolments.find_token(tx, digest))
        if found is None:
            raise Unauthenticated("this enrolment token is not known")
        state = state_of(found, now=self._state.clock())
        if state is not TokenState.USABLE:
            raise Unauthenticated(f"this enrolment token is {state.replace('_', ' ')}")
        return Caller(
            actor=f"enrolment:{found.id}",
            audience=Audience.ENROLMENT,
            address=address,
            tenant_id=found.tenant_id,
            enrolment_token_id=found.id,
        )

    async def _runner(self, headers: Headers, address: str) -> Caller:
        digest = secret_hash(bearer_token(headers))
        runner_id = self._remembered(digest)
        if runner_id is not None:
            return _runner_caller(runner_id, address)
        version = self._state.rights.version
        found = await self._state.lanes.read(lambda tx: find_runner_by_secret(tx, digest))
        if found is None:
            raise Unauthenticated("this runner is not known")
        if found.revoked_at is not None:
            raise Revoked("this runner was revoked")
        caller = _runner_caller(found.id, address)
        if found.former_secret_hash is not None and found.secret_hash == digest:
            now = self._state.clock()
            await self._state.lanes.write(lambda tx: use_secret(tx, caller, digest, now=now))
            self._known.pop(found.former_secret_hash, None)
        if version == self._state.rights.version:  # else it may have been looked up before the change
            self._remember(digest, found.id)
        return caller

    def _remembered(self, digest: bytes) -> str | None:
        if self._version != self._state.rights.version:
            self._known.clear()
            self._version = self._state.rights.version
        known = self._known.get(digest)
        if known is None or known[1] < time.monotonic():
            return None
        return known[0]

    def _remember(self, digest: bytes, runner_id: str) -> None:
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[digest] = (runner_id, time.monotonic() + CACHE_S)


def _runner_caller(runner_id: str, address: str) -> Caller:
    return Caller(actor=f"runner:{runner_id}", audience=Audience.RUNNER, address=address, runner_id=runner_id)


def bearer_token(headers: Headers) -> str:
    """The one bearer token of a request."""
    values = [value for name, value in headers if name == b"authorization"]
    if len(values) != 1:
        raise Unauthenticated("exactly one Authorization header is needed")
    scheme, _, token = values[0].decode("latin-1").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token or len(token) > _MAX_TOKEN:
        raise Unauthenticated("a bearer token is needed")
    return token


def _equal(given: str, expected: str) -> bool:
    return hmac.compare_digest(given.encode(), expected.encode())


def _has(headers: Headers, name: bytes) -> bool:
    return any(key == name for key, _ in headers)
