"""From a credential to a Caller. Nothing else in a request says who is calling."""

import hmac
import time
from collections.abc import Sequence

from coordinator.actions.register_runner import secret_hash
from coordinator.api.state import AppState
from coordinator.errors import Unauthenticated
from coordinator.rules.access import Audience, Caller
from coordinator.store.runners import find_runner_by_secret

Headers = Sequence[tuple[bytes, bytes]]

CACHE_S = 5.0
MAX_CACHED = 10_000
_MAX_TOKEN = 4096


class Doorkeeper:
    """Finds out who calls; a runner's secret is looked up again at the latest after 5 seconds."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._known: dict[bytes, tuple[str, float]] = {}

    async def admit(self, audience: Audience, headers: Headers, address: str) -> Caller:
        """The caller of a route for this audience, or Unauthenticated."""
        if audience is Audience.ANYONE:
            return Caller(actor="anyone", audience=audience, address=address)
        if audience is Audience.RUNNER:
            return await self._runner(headers, address)
        if audience is Audience.STEP and _has(headers, b"x-attempt"):
            return await self._runner(headers, address)
        is_open = self._state.settings.auth == "open"
        if is_open and not (audience is Audience.ENROLMENT and _has(headers, b"authorization")):
            return Caller(actor="local", audience=Audience.USER, address=address)
        return self._holder_of_token(audience, headers, address)

    def _holder_of_token(self, audience: Audience, headers: Headers, address: str) -> Caller:
        token = bearer_token(headers)
        credentials = self._state.credentials
        if _equal(token, credentials.admin_token):
            return Caller(actor="admin", audience=Audience.USER, address=address)
        if audience is Audience.ENROLMENT and _equal(token, credentials.registration_token):
            return Caller(actor="registration-token", audience=Audience.ENROLMENT, address=address)
        raise Unauthenticated("this token is not known")

    async def _runner(self, headers: Headers, address: str) -> Caller:
        digest = secret_hash(bearer_token(headers))
        runner_id = self._remembered(digest)
        if runner_id is None:
            found = await self._state.lanes.read(lambda tx: find_runner_by_secret(tx, digest))
            if found is None:
                raise Unauthenticated("this runner is not known")
            runner_id = str(found.id)
            self._remember(digest, runner_id)
        return Caller(
            actor=f"runner:{runner_id}", audience=Audience.RUNNER, address=address, runner_id=runner_id
        )

    def _remembered(self, digest: bytes) -> str | None:
        known = self._known.get(digest)
        if known is None or known[1] < time.monotonic():
            return None
        return known[0]

    def _remember(self, digest: bytes, runner_id: str) -> None:
        if len(self._known) >= MAX_CACHED:
            self._known.clear()
        self._known[digest] = (runner_id, time.monotonic() + CACHE_S)


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
