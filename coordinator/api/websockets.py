"""WebSockets: who opens one is known before it is accepted, and looked at again for as long as it is open.

A refusal is an HTTP answer in the form of the surface. Afterwards these codes say why we close:

    1000  everything was said                 4401  the credential has expired or was called back
    1008  the caller sends too much           4403  the caller may not any more
    1011  something went wrong here           4404  what was followed is gone
    1012  the coordinator stops               4408  the caller takes nothing, or too slowly
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, TypeVar

import structlog
from pydantic import ValidationError
from sqlmodel import Session
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.actions.take_ticket import TakenTicket, take_ticket
from coordinator.api import guards, strict_json
from coordinator.api.auth import Doorkeeper, bearer_token
from coordinator.api.denials import Denials
from coordinator.api.endpoint import Query, behind_walls
from coordinator.api.identify import TENANT_HEADER, Identity, tenant_header
from coordinator.api.problems import Form, Refusal, refusal_of
from coordinator.api.rate_limit import count_for
from coordinator.api.state import AppState
from coordinator.api.text_frames import EXTENSION, texts_in
from coordinator.errors import (
    CoordinatorError,
    Denied,
    Invalid,
    NotFound,
    TooMany,
    Unauthenticated,
    Unavailable,
)
from coordinator.rules.access import Audience, Caller, Policy
from coordinator.rules.principals import principal_of
from shared.faults import Fault
from shared.plan import shape_faults

T = TypeVar("T")
log = structlog.get_logger()

COOKIE = "buildmill_session"
SUBPROTOCOL = "bearer"
RETRY_AFTER_S = 30
_MAX_TOKEN = 4096
_HEADER, _PROTOCOL, _TICKET, _COOKIE = "Authorization", "Sec-WebSocket-Protocol", "ticket", "Cookie"


@dataclass(frozen=True)
class Patience:
    """How long a caller is waited for, and how often its rights are looked at again."""

    send_s: float = 10.0
    recheck_s: float = 15.0


@dataclass(frozen=True)
class Opening:
    """A caller that wants to open a WebSocket: what it asked for, and the ways into the system."""

    state: AppState
    caller: Caller
    path: Mapping[str, str]
    query: Any

    async def read(self, action: Callable[..., T], /, *args: Any, **named: Any) -> T:
        look = behind_walls(self.state, self.caller, lambda tx: action(tx, *args, **named))
        return await self.state.lanes.read(look)


class Stream:
    """What a kind of WebSocket sends. One for all callers, so that they can share what they read."""

    async def open(self, opening: Opening) -> AsyncIterator[bytes]:
        """Frames of text to be sent; raises what is refused before anything is accepted."""
        raise NotImplementedError


@dataclass(frozen=True)
class Socket:
    """One WebSocket: its place, its policy, what it takes and what makes its streams."""

    path: str
    policy: Policy
    query: type[Query]
    make_stream: Callable[[AppState], Stream]
    form: Form
    patience: Patience = field(default_factory=Patience)
    # of one caller, at the same time
    most_open: int = 500


@dataclass(frozen=True)
class _Known:
    """Who opens a WebSocket, in which way it said so, and about which tenant it is."""

    identity: Identity
    tenant_id: str | None
    way: str


@dataclass(frozen=True)
class _Closing:
    code: int
    reason: str


_ENDED = _Closing(1000, "everything was said")
_FAILED = _Closing(1011, "something went wrong")
_EXPIRED = _Closing(4401, "the credential does not count any more")
_NO_RIGHTS = _Closing(4403, "you may not any more")
_GONE = _Closing(4404, "it is not there any more")
_SLOW = _Closing(4408, "too slow")


def sockets_of(
    sockets: Sequence[Socket], state: AppState, doorkeeper: Doorkeeper, denials: Denials
) -> dict[str, ASGIApp]:
    """What answers each path that is a WebSocket."""
    return {one.path: _SocketApp(one, state, doorkeeper, denials) for one in sockets}


class _SocketApp:
    """One path, from the wish to open it to the word by which it is closed."""

    def __init__(self, socket: Socket, state: AppState, doorkeeper: Doorkeeper, denials: Denials) -> None:
        self._socket = socket
        self._state = state
        self._doorkeeper = doorkeeper
        self._denials = denials
        self._stream = socket.make_stream(state)
        self._open: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (await receive())["type"] == "websocket.connect":
            with contextlib.ExitStack() as counted:
                await self._open_it(scope, receive, send, counted)

    async def _open_it(
        self, scope: Scope, receive: Receive, send: Send, counted: contextlib.ExitStack
    ) -> None:
        """It counts as open from before anything is waited for: many at once are as many as one by one."""
        address = scope["client"][0] if scope.get("client") else ""
        caller = Caller(actor="unknown", audience=Audience.ANYONE, address=address)
        try:
            query = _read_query(self._socket.query, scope)
            known = await self._recognise(scope, query)
            count_for(scope, self._state, known.identity)
            caller = await self._doorkeeper.recognise(
                known.identity, self._socket.policy, known.tenant_id, address
            )
            if self._open[_principal(caller)] >= self._socket.most_open:
                raise TooMany("too many WebSockets are open", retry_after_s=RETRY_AFTER_S)
            counted.enter_context(self._counted(_principal(caller)))
            opening = Opening(self._state, caller, scope["path_params"], query)
            frames = await self._stream.open(opening)
        except CoordinatorError as error:
            refused = refusal_of(error)
            named = [str(value) for value in scope["path_params"].values()]
            await self._denials.write_refusal(error, refused.status, caller, "GET", self._socket.path, named)
            await self._socket.form(refused)(scope, receive, send)
            return
        except Exception:
            # the last line of defence: the cause goes to our log, the caller gets no trace of it
            log.exception("unexpected", method="GET", path=self._socket.path)
            sentence = "something went wrong here; the coordinator's log has the cause"
            await self._socket.form(Refusal(500, "internal", sentence))(scope, receive, send)
            return
        chosen = SUBPROTOCOL if known.way == _PROTOCOL else None
        with contextlib.suppress(OSError):  # the caller has gone
            await send({"type": "websocket.accept", "subprotocol": chosen, "headers": []})
            closing = await self._converse(caller, frames, scope, receive, send)
            if closing is not None:
                await send({"type": "websocket.close", "code": closing.code, "reason": closing.reason})

    @contextlib.contextmanager
    def _counted(self, principal: str) -> Iterator[None]:
        self._open[principal] += 1
        try:
            yield
        finally:
            self._open[principal] -= 1
            if not self._open[principal]:
                del self._open[principal]

    # Who it is

    async def _recognise(self, scope: Scope, query: Any) -> _Known:
        headers = scope["headers"]
        found = _ways(scope, query)
        if len(found) > 1:
            named = " and ".join(found)
            raise Invalid(
                "credentials are given in more than one way",
                details=tuple(Fault(way, f"must be the only credential, not {named}") for way in found),
            )
        if not found:
            raise Unauthenticated("a credential is needed")
        (way,) = found
        if way == _TICKET:
            return await self._by_ticket(scope, query)
        if way == _COOKIE:
            _require_own_page(scope)
        token = bearer_token(headers) if way == _HEADER else found[way]
        if not token or len(token) > _MAX_TOKEN:
            raise Unauthenticated("a bearer token is needed")
        identity = await self._doorkeeper.identities.of_token(token)
        return _Known(identity, _tenant(headers, query), way)

    async def _by_ticket(self, scope: Scope, query: Any) -> _Known:
        if query.tenant is not None or any(name == b"x-tenant-id" for name, _ in scope["headers"]):
            raise Invalid(
                "a ticket is for one tenant already",
                details=(Fault("tenant", "must be left out with a ticket"),),
            )
        now = self._state.clock()

        def take(tx: Session) -> TakenTicket | None:
            return take_ticket(tx, query.ticket, now=now)

        taken = await self._state.lanes.write(take)
        if taken is None or taken.build_id != scope["path_params"].get("id"):
            raise Unauthenticated("this ticket is not known, or does not count any more")
        if _is_over(taken.credential_expires_at, now):
            raise Unauthenticated("the credential behind this ticket has expired")
        identity = await self._doorkeeper.identities.of_credential(taken.credential, taken.user_id)
        expires_at = taken.credential_expires_at or identity.expires_at
        return _Known(replace(identity, expires_at=expires_at), taken.tenant_id, _TICKET)

    # While it is open

    async def _converse(
        self, caller: Caller, frames: AsyncIterator[bytes], scope: Scope, receive: Receive, send: Send
    ) -> _Closing | None:
        """Send until one of the two sides ends it; None when it was the other."""
        listening = asyncio.create_task(_listen(receive))
        watching = asyncio.create_task(self._watch(caller))
        sending = asyncio.create_task(self._send_all(frames, scope, send))
        tasks = (listening, watching, sending)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            first = next(task for task in tasks if task.done())
            return first.result()
        except OSError:
            return None  # sent to who has just left
        except Exception:
            log.exception("unexpected", method="GET", path=self._socket.path)
            return _FAILED
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _send_all(self, frames: AsyncIterator[bytes], scope: Scope, send: Send) -> _Closing:
        takes_frames = EXTENSION in scope.get("extensions", {})
        try:
            async for some in frames:
                messages: list[Message] = (
                    [{"type": "websocket.send", "frames": some}]
                    if takes_frames
                    else [{"type": "websocket.send", "text": text} for text in texts_in(some)]
                )
                for message in messages:
                    async with asyncio.timeout(self._socket.patience.send_s):
                        await send(message)
        except TimeoutError:
            return _SLOW
        except NotFound:
            return _GONE
        return _ENDED

    async def _watch(self, caller: Caller) -> _Closing:
        """Until the credential or the right is gone: at that very moment, or when it is looked at again."""
        while True:
            await asyncio.sleep(self._until_next_look(caller.expires_at))
            if _is_over(caller.expires_at, self._state.clock()):
                return _EXPIRED
            try:
                identity = await self._doorkeeper.identities.of_credential(caller.credential, caller.user_id)
                await self._doorkeeper.recognise(
                    identity, self._socket.policy, caller.tenant_id, caller.address
                )
            except Unauthenticated:
                return _EXPIRED
            except Denied:
                return _NO_RIGHTS
            except Unavailable:
                continue  # nobody is turned away because the database is

    def _until_next_look(self, expires_at: datetime | None) -> float:
        wait_s = self._socket.patience.recheck_s
        if expires_at is None:
            return wait_s
        return max(0.0, min(wait_s, (expires_at - self._state.clock()).total_seconds()))


async def _listen(receive: Receive) -> None:
    """Until the caller has gone. What it says is not asked for; the server bounds how much it may say."""
    while (await receive())["type"] != "websocket.disconnect":
        pass


def _read_query(model: type[Query], scope: Scope) -> Any:
    try:
        return model.model_validate(
            strict_json.parse_query(scope["query_string"]), by_alias=True, by_name=False
        )
    except strict_json.BadJson as error:
        raise Invalid("the query string is not valid", details=(Fault(error.path, error.reason),)) from error
    except ValidationError as error:
        raise Invalid("the query string is not valid", details=tuple(shape_faults(error))) from error


def _ways(scope: Scope, query: Any) -> dict[str, str]:
    """Every way in which a caller shows a credential."""
    found: dict[str, str] = {}
    if any(name == b"authorization" for name, _ in scope["headers"]):
        found[_HEADER] = ""
    offered = scope.get("subprotocols", [])
    if SUBPROTOCOL in offered:
        is_whole = len(offered) == 2 and offered[0] == SUBPROTOCOL
        found[_PROTOCOL] = offered[1] if is_whole else ""
    if query.ticket is not None:
        found[_TICKET] = query.ticket
    cookies = _cookies(scope)
    if cookies:
        found[_COOKIE] = cookies[0] if len(cookies) == 1 else ""
    return found


def _cookies(scope: Scope) -> list[str]:
    """Our own cookie, each time that it is sent."""
    values = [value.decode("latin-1") for name, value in scope["headers"] if name == b"cookie"]
    pairs = [pair.strip().partition("=") for value in values for pair in value.split(";")]
    return [value for name, _, value in pairs if name == COOKIE]


def _require_own_page(scope: Scope) -> None:
    """A cookie is sent by every page that asks us for something, so only our own may use it."""
    has_origin = any(name == b"origin" for name, _ in scope["headers"])
    if not has_origin or not guards.is_same_origin(scope):
        raise Denied("only a page of this server may use its cookie")


def _tenant(headers: guards.Headers, query: Any) -> str | None:
    """The tenant that is named, in the header or for who cannot send one in the query; one of the two."""
    named = tenant_header(headers, is_required=query.tenant is None)
    if query.tenant is None:
        return named
    if named is not None:
        reason = f"must be left out, as {TENANT_HEADER} is sent"
        raise Invalid("the tenant is named twice", details=(Fault("tenant", reason),))
    try:
        return tenant_header([(b"x-tenant-id", query.tenant.encode())], is_required=True)
    except Invalid as error:
        details = tuple(Fault("tenant", fault.reason) for fault in error.details)
        raise Invalid("the query string is not valid", details=details) from error


def _principal(caller: Caller) -> str:
    return principal_of(caller.user_id, caller.credential)


def _is_over(moment: datetime | None, now: datetime) -> bool:
    return moment is not None and moment <= now
