"""How many requests a minute one principal may send, and the headers that tell it how many are left.

The principal is who the credential stands for: a user with all its logins and tokens is one. Without a
credential that counts it is the peer of the connection; nothing else in a request says who is calling.
"""

import math
import posixpath
import re
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.api.auth import bearer_token
from coordinator.api.identify import Identities, Identity
from coordinator.api.problems import Form, refusal_of
from coordinator.api.state import AppState
from coordinator.errors import CoordinatorError, TooMany
from coordinator.rules.principals import NOBODY, peer_of, principal_of

log = structlog.get_logger()

WINDOW = timedelta(minutes=1)
MAX_KNOWN = 100_000
_COUNTED = "buildmill.counted"


@dataclass(frozen=True)
class Standing:
    """Where a principal stands after a request of its own."""

    limit: int
    used: int
    ends_at: datetime

    @property
    def is_exceeded(self) -> bool:
        return self.used > self.limit

    def headers(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"x-ratelimit-limit", b"%d" % self.limit),
            (b"x-ratelimit-remaining", b"%d" % max(0, self.limit - self.used)),
            (b"x-ratelimit-reset", b"%d" % math.ceil(self.ends_at.timestamp())),
        ]

    def refusal(self, now: datetime) -> TooMany:
        wait = max(1, math.ceil((self.ends_at - now).total_seconds()))
        return TooMany(f"more than {self.limit} requests in a minute", retry_after_s=wait)


@dataclass
class _Window:
    ends_at: datetime
    used: int = 0


class Windows:
    """A window of a minute begins with the first request; at most so many are kept, the oldest goes first.

    Who could make the oldest go would need more addresses than that, and gains no more than each of them has.
    """

    def __init__(self, most: int = MAX_KNOWN) -> None:
        self._most = most
        self._open: OrderedDict[str, _Window] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def take(self, key: str, *, limit: int, now: datetime) -> Standing:
        """Count one request."""
        self._close(now)
        window = self._open.get(key)
        if window is None:
            if len(self._open) >= self._most:
                self._open.popitem(last=False)
            window = self._open[key] = _Window(now + WINDOW)
        window.used = min(window.used, limit) + 1
        return Standing(limit, window.used, window.ends_at)

    def give_back(self, key: str) -> None:
        """That request was another one's."""
        if key in self._open:
            self._open[key].used = max(0, self._open[key].used - 1)

    def _close(self, now: datetime) -> None:
        while self._open and next(iter(self._open.values())).ends_at <= now:
            self._open.popitem(last=False)


class RateLimits:
    """The counts of this process. Strangers have windows of their own, so that they push out no user's."""

    def __init__(self) -> None:
        self.principals = Windows()
        self.peers = Windows()

    def count_principal(self, state: AppState, identity: Identity) -> Standing | None:
        """None where no limit is set."""
        limit = state.settings.rate_limit
        key = principal_of(identity.user_id, identity.credential)
        return self.principals.take(key, limit=limit, now=state.clock()) if limit else None

    def count_peer(self, state: AppState, peer: str) -> Standing | None:
        limit = state.settings.rate_limit_peer
        return self.peers.take(peer, limit=limit, now=state.clock()) if limit else None


@dataclass
class _Counted:
    """For whom a request has been counted; `peer` is set as long as that is nobody better known."""

    limits: RateLimits
    standing: Standing | None
    peer: str | None


def count_for(scope: Scope, state: AppState, identity: Identity) -> None:
    """Count a request for who turned out to have sent it, or TooMany.

    For what shows its credential elsewhere than in the Authorization header, as a WebSocket may: until then
    it was its peer's. What has been counted for a principal already is not counted again.
    """
    counted: _Counted | None = scope.get(_COUNTED)
    if counted is None or counted.peer is None:
        return
    counted.limits.peers.give_back(counted.peer)
    counted.peer = None
    counted.standing = counted.limits.count_principal(state, identity)
    if counted.standing is not None and counted.standing.is_exceeded:
        raise counted.standing.refusal(state.clock())


class RateLimited:
    """Counts each request below a prefix before anything looks at it, and puts the headers on each answer."""

    _STARTS = ("http.response.start", "websocket.http.response.start", "websocket.accept")

    def __init__(
        self, app: ASGIApp, *, prefix: str, state: AppState, identities: Identities, form: Form
    ) -> None:
        self._app = app
        self._prefix = prefix
        self._state = state
        self._identities = identities
        self._form = form
        self._limits = RateLimits()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or not is_below(self._prefix, scope["path"]):
            await self._app(scope, receive, send)
            return
        counted = scope[_COUNTED] = await self._count(scope)

        async def send_with_headers(message: Message) -> None:
            if message["type"] in self._STARTS and counted.standing is not None:
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), *counted.standing.headers()],
                }
            await send(message)

        answer = self._app
        if counted.standing is not None and counted.standing.is_exceeded:
            answer = self._form(refusal_of(counted.standing.refusal(self._state.clock())))
        await answer(scope, receive, send_with_headers)

    async def _count(self, scope: Scope) -> _Counted:
        identity = await self._identity(scope)
        if identity is not None:
            return _Counted(self._limits, self._limits.count_principal(self._state, identity), None)
        peer = peer_of(scope["client"][0]) if scope.get("client") else NOBODY
        return _Counted(self._limits, self._limits.count_peer(self._state, peer), peer)

    async def _identity(self, scope: Scope) -> Identity | None:
        if not any(name == b"authorization" for name, _ in scope["headers"]):
            return None
        try:
            return await self._identities.of_token(bearer_token(scope["headers"]))
        except CoordinatorError:
            return None
        except Exception:
            # the last line of defence: the door behind this meets it again and answers for it
            log.exception("unexpected", path=scope["path"])
            return None


def is_below(prefix: str, path: str) -> bool:
    """Whether a path means something below the prefix, also when it is spelt as no route is."""
    plain = posixpath.normpath(re.sub("/+", "/", path)).lower()
    return plain == prefix or plain.startswith(f"{prefix}/")
