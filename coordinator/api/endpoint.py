"""The one path of a request: JSON -> body model -> caller -> lane -> action -> JSON.

A surface is a list of Endpoints. What an Endpoint declares is also what the served specification says.
"""

import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, TypeVar

import structlog
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError
from sqlmodel import Session
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.actions.leased_step import LeaseProof
from coordinator.api import guards, strict_json
from coordinator.api.auth import Doorkeeper
from coordinator.api.denials import Denials
from coordinator.api.problems import Form, Refusal, build_server_form, refusal_of
from coordinator.api.state import AppState
from coordinator.errors import CoordinatorError, Invalid
from coordinator.rules.access import Audience, Caller, Policy
from coordinator.store.walls import stand_behind
from shared.faults import Fault
from shared.ids import canonical_id, is_id
from shared.paths import ATTEMPT_HEADER, LEASE_HEADER
from shared.plan import shape_faults

T = TypeVar("T")
log = structlog.get_logger()

MAX_BODY = 1024 * 1024
_DECIMAL = re.compile(r"0|-?[1-9][0-9]{0,18}")


@dataclass(frozen=True)
class Answer:
    """One possible answer of an endpoint, as the specification shows it."""

    description: str
    model: Any = None
    media_type: str = "application/json"
    other_media_types: tuple[str, ...] = ()


@dataclass(frozen=True)
class Endpoint:
    """One operation: its place, its policy, what it takes and what it answers."""

    method: str
    path: str
    name: str
    summary: str
    tag: str
    policy: Policy
    handler: "Callable[[Call], Awaitable[Response]]"
    answers: Mapping[int, Answer]
    description: str = ""
    body: type[BaseModel] | None = None
    body_is_optional: bool = False
    documented_body: type[BaseModel] | None = None
    query: type[BaseModel] | None = None
    takes_stream: bool = False
    before_body: "Callable[[Call], Awaitable[None]] | None" = None
    body_limit: int = MAX_BODY
    is_contract: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)
    form: Form = build_server_form
    needs_credential: bool = False
    is_idempotent: bool = False


@dataclass(frozen=True)
class Call:
    """One request on its way: what was sent, who sent it, and the ways into the system."""

    state: AppState
    endpoint: Endpoint
    request: Request
    caller: Caller
    path: Mapping[str, str]
    admit: Callable[[], Awaitable[Caller]]
    refuse: Callable[[Exception], Awaitable[Refusal]]
    body: Any = None
    raw_body: Any = None
    query: Any = None

    async def read_again(self, action: Callable[..., T], /, *args: Any, **named: Any) -> T:
        """`read` a while after the request, as long as the credential and the right of the caller count."""
        caller = await self.admit()
        return await replace(self, caller=caller).read(action, *args, caller=caller, **named)

    async def write(self, action: Callable[..., T], /, *args: Any, weight: int = 1, **named: Any) -> T:
        """Run an action in a transaction, with the present moment as `now`.

        `weight` is how many usual actions it takes as long as.
        """
        now = self.state.clock()
        return await self.state.lanes.write(
            self._behind_walls(lambda tx: action(tx, *args, now=now, **named)), weight=weight
        )

    async def write_shortly(self, action: Callable[..., T], /, *args: Any, **named: Any) -> T:
        """`write` for an action of a few statements that touches no file."""
        now = self.state.clock()
        return await self.state.lanes.write_shortly(lambda tx: action(tx, *args, now=now, **named))

    async def change(self, action: Callable[..., T], /, *args: Any, **named: Any) -> T:
        """`write` for the few actions that do not ask what time it is."""
        return await self.state.lanes.write(self._behind_walls(lambda tx: action(tx, *args, **named)))

    async def read(self, action: Callable[..., T], /, *args: Any, **named: Any) -> T:
        return await self.state.lanes.read(self._behind_walls(lambda tx: action(tx, *args, **named)))

    def _behind_walls(self, action: Callable[[Session], T]) -> Callable[[Session], T]:
        return behind_walls(self.state, self.caller, action)

    def proof(self) -> LeaseProof:
        """The attempt and the lease a runner sends with each write."""
        attempt = self.request.headers.getlist(ATTEMPT_HEADER)
        lease = self.request.headers.getlist(LEASE_HEADER)
        if len(attempt) != 1 or not re.fullmatch(r"[0-9]{1,9}", attempt[0]):
            raise Invalid(f"exactly one {ATTEMPT_HEADER} header with a number is needed")
        if len(lease) != 1 or len(lease[0]) > 128:
            raise Invalid(f"exactly one {LEASE_HEADER} header is needed")
        return LeaseProof(int(attempt[0]), lease[0])

    def maybe_proof(self) -> LeaseProof | None:
        return self.proof() if ATTEMPT_HEADER in self.request.headers else None


def behind_walls(state: AppState, caller: Caller, action: Callable[[Session], T]) -> Callable[[Session], T]:
    """The same, where for a user the rows of other tenants are not there at all."""
    tenants = caller.tenants if state.has_walls else None
    if tenants is None:
        return action

    def behind(tx: Session) -> T:
        stand_behind(tx, tenants, state.site.common_images)
        return action(tx)

    return behind


def _decimal(value: object) -> object:
    if isinstance(value, str):
        if not _DECIMAL.fullmatch(value):
            raise ValueError("must be a decimal integer")
        number = int(value)
        if not -(2**63) <= number < 2**63:
            raise ValueError("does not fit into 64 bits")
        return number
    return value


def _truth(value: object) -> object:
    if isinstance(value, str):
        if value not in ("true", "false"):
            raise ValueError("must be true or false")
        return value == "true"
    return value


AnyCaseId = Annotated[str, AfterValidator(canonical_id)]
QueryInt = Annotated[int, BeforeValidator(_decimal)]
QueryBool = Annotated[bool, BeforeValidator(_truth)]


class Query(BaseModel):
    """The parameters of a query string: closed, each given at most once."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


def json_answer(model: BaseModel | Sequence[BaseModel], status: int = 200) -> Response:
    """The JSON of a model, or of a list of them; what is unset is left out."""
    if isinstance(model, BaseModel):
        content = model.model_dump_json(by_alias=True, exclude_none=True)
    else:
        content = (
            "[" + ",".join(item.model_dump_json(by_alias=True, exclude_none=True) for item in model) + "]"
        )
    return Response(content, status_code=status, media_type="application/json")


def routes_of(
    endpoints: Sequence[Endpoint], state: AppState, doorkeeper: Doorkeeper, denials: Denials
) -> list[Route]:
    """One route per path, in the order of the list; a method that is not there is 405."""
    by_path: dict[str, dict[str, Endpoint]] = {}
    for endpoint in endpoints:
        by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint
    return [
        Route(path, _PathApp(methods, state, doorkeeper, denials), include_in_schema=False)
        for path, methods in by_path.items()
    ]


class _PathApp:
    """Everything that can be done with one path."""

    def __init__(
        self, methods: dict[str, Endpoint], state: AppState, doorkeeper: Doorkeeper, denials: Denials
    ) -> None:
        self._methods = methods
        self._state = state
        self._doorkeeper = doorkeeper
        self._denials = denials

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = self._methods.get(scope["method"])
        if endpoint is None:
            allowed = {"Allow": ", ".join(sorted(self._methods))}
            form = next(iter(self._methods.values())).form
            answer: ASGIApp = form(
                Refusal(405, "method_not_allowed", "this path does not take this method", headers=allowed)
            )
        else:
            answer = await self._answer(endpoint, Request(scope, receive, send))
        await answer(scope, receive, send)

    async def _answer(self, endpoint: Endpoint, request: Request) -> Response:
        address = request.scope["client"][0] if request.scope.get("client") else ""
        caller = Caller(actor="unknown", audience=Audience.ANYONE, address=address)
        named = [str(value) for value in request.path_params.values()]
        try:
            admit = partial(
                self._doorkeeper.admit,
                endpoint.policy,
                request.scope["headers"],
                address,
                needs_credential=endpoint.needs_credential,
            )
            caller = await admit()
            refuse = partial(self._refuse, endpoint, caller, named)
            call = await self._call(endpoint, request, caller, admit, refuse)
            named += _ids_in(call.raw_body)
            return await endpoint.handler(call)
        except Exception as error:  # noqa: BLE001 - the last line of defence
            return endpoint.form(await self._refuse(endpoint, caller, named, error))

    async def _refuse(
        self, endpoint: Endpoint, caller: Caller, named: Collection[str], error: Exception
    ) -> Refusal:
        """What the caller hears of an error, which is written down if it belongs into the trail."""
        if not isinstance(error, CoordinatorError | guards.UnreadableBody):
            # the cause goes to our log, the caller gets no trace of it
            log.error("unexpected", method=endpoint.method, path=endpoint.path, exc_info=error)
            sentence = "something went wrong here; the coordinator's log has the cause"
            return Refusal(500, "internal", sentence)
        refused = refusal_of(error)
        await self._denials.write_refusal(
            error, refused.status, caller, endpoint.method, endpoint.path, named
        )
        return refused

    async def _call(
        self,
        endpoint: Endpoint,
        request: Request,
        caller: Caller,
        admit: Callable[[], Awaitable[Caller]],
        refuse: Callable[[Exception], Awaitable[Refusal]],
    ) -> Call:
        query = _read_query(endpoint, request.scope)
        path = {name: str(value) for name, value in request.path_params.items()}
        call = Call(self._state, endpoint, request, caller, path, admit, refuse, query=query)
        if endpoint.before_body is not None:
            await endpoint.before_body(call)
        if endpoint.takes_stream:
            return call
        body, raw = await self._read_body(endpoint, request)
        return replace(call, body=body, raw_body=raw)

    async def _read_body(self, endpoint: Endpoint, request: Request) -> tuple[Any, Any]:
        if endpoint.method == "GET":
            return None, None
        headers = request.scope["headers"]
        if endpoint.body is not None and not endpoint.body_is_optional:
            guards.check_json_content_type(headers)
        deadline_s = self._state.settings.body_deadline
        if endpoint.body is None:
            await _require_no_body(request, deadline_s)
            return None, None
        data = await guards.read_body(
            request.receive, headers, limit=endpoint.body_limit, deadline_s=deadline_s
        )
        if endpoint.body_is_optional:
            if not data:
                return None, None
            guards.check_json_content_type(headers)
        return parse_body(endpoint.body, data)


async def _require_no_body(request: Request, deadline_s: float) -> None:
    """Whatever is sent is too much, so that neither its size nor its form matters."""
    try:
        await guards.read_body(request.receive, request.scope["headers"], limit=0, deadline_s=deadline_s)
    except guards.ClientGone:
        raise
    except guards.UnreadableBody as error:
        fault = Fault("body", "must be empty")
        raise Invalid("this operation takes no body", details=(fault,)) from error


def parse_body(model: type[BaseModel], data: bytes) -> tuple[Any, Any]:
    """The validated body and the same as plain JSON, or Invalid with every fault."""
    try:
        raw = strict_json.parse(data)
    except strict_json.BadJson as error:
        raise Invalid("the body is not valid", details=(Fault(error.path, error.reason),)) from error
    try:
        return model.model_validate_json(data, by_alias=True, by_name=False), raw
    except ValidationError as error:
        faults = tuple(replace(fault, path=fault.path or "body") for fault in shape_faults(error))
        raise Invalid("the body is not valid", details=faults) from error


def _ids_in(body: Any) -> list[str]:
    """The things that a body names, which are as little for everybody as those in a path."""
    said = body.values() if isinstance(body, dict) else ()
    return [its_id for text in said if isinstance(text, str) and is_id(its_id := canonical_id(text))]


def _read_query(endpoint: Endpoint, scope: Scope) -> Any:
    try:
        found = strict_json.parse_query(scope["query_string"])
    except strict_json.BadJson as error:
        raise Invalid("the query string is not valid", details=(Fault(error.path, error.reason),)) from error
    if endpoint.query is None:
        if found:
            unknown = tuple(Fault(name, "is not a known parameter") for name in found)
            raise Invalid("the query string is not valid", details=unknown)
        return None
    try:
        return endpoint.query.model_validate(found, by_alias=True, by_name=False)
    except ValidationError as error:
        raise Invalid("the query string is not valid", details=tuple(shape_faults(error))) from error
