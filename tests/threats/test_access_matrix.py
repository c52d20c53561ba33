"""Every route, every id it takes, and everybody who could ask: who is let in, and what the others can tell.

The table of routes is the coordinator's own. A route that is new, and for which nothing here knows a real id
or a body, fails this module.
"""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import httpx
import pytest
from anyio.from_thread import BlockingPortal
from pydantic import BaseModel

from coordinator.api.endpoint import Endpoint
from coordinator.app import ALL_ENDPOINTS, create_app
from coordinator.rules.access import Audience, Policy, Scope
from coordinator.settings import Settings
from coordinator.store.dialect import open_database
from coordinator.store.migrate import migrate
from coordinator.tables import Row
from shared.ids import new_id
from tests.conftest import BOTH
from tests.factories import PASSWORD, Held, Mill, a_step
from tests.fakes import InProcess, SettableClock
from tests.threats.estates import Asker, Estate, Ids, an_estate, askers, nothing_of

_NUMBERS = itertools.count(1)

# What a parameter in a path stands for, by the word before it.
KINDS = {
    "artifacts": "artifact",
    "blobs": "blob",
    "builds": "build",
    "cancels": "cancel",
    "docker-images": "image",
    "enrolment-tokens": "enrolment",
    "members": "user",
    "projects": "project",
    "runner": "step",
    "runners": "runner",
    "secrets": "secret",
    "steps": "step",
    "tenants": "tenant",
    "tokens": "token",
    "users": "user",
    "workflows": "workflow",
}
# Names that their owner makes up: alone they lead nowhere.
NAMES = {"secret"}
# Users belong to the installation: who is told somebody's id may make them a member.
OF_NO_TENANT = {"user"}

# Fields of bodies and queries that name a thing.
NAMED = {
    ("AttemptReport", "step_id"): "step",
    ("AuditQuery", "projectId"): "project",
    ("BuildCreate", "workflow_id"): "workflow",
    ("ByAccount", "accountId"): "account",
    ("ExecutionCreate", "project_id"): "project",
    ("ExecutionProjectPatch", "default_workflow_id"): "workflow",
    ("ExecutionQuery", "project_id"): "project",
    ("ProjectCreate", "account_id"): "account",
    ("ProjectPatch", "default_workflow_id"): "workflow",
    ("ReportedCompletion", "step_id"): "step",
    ("ReportedStart", "step_id"): "step",
    ("TenantQuery", "account"): "account",
    ("TicketIn", "build_id"): "build",
}
# Fields that look as if they did.
NAMING_NOTHING = {("Acquire", "request_id"), ("TenantIn", "account_id")}
# Whoever names a thing of others there is not told 404, but the same as for what does not exist.
INSTEAD_OF_404 = {
    ("list_projects", "accountId"): 200,
    ("list_audit_logs", "projectId"): 200,
    ("execution_list_builds", "project_id"): 200,
    ("create_project", "account_id"): 403,
    ("change_project", "default_workflow_id"): 400,
    ("execution_change_project", "default_workflow_id"): 400,
    ("put_blob", "sha256"): 422,
    ("answer_reports", "step_id"): 200,
    ("heartbeat", "step_id"): 200,
    ("resume", "step_id"): 200,
}

# In which state a thing has to be for a route to do what it is for, where any would not do.
FRESH = {
    "execution_delete_build": "cancelled_build",
    "execution_retry_build": "cancelled_build",
    "execution_start_build": "created_build",
    "retry_build": "cancelled_build",
}
# What these do is done to the credential itself; they name nothing.
OF_ONESELF = {"execution_log_out", "execution_change_password", "take_secret"}
# Fields by which a body would say what only we know.
SAID_BY_NOBODY = {
    *("id", "tenant_id", "tenantId", "user_id", "runner_id", "runnerId", "created_by", "createdAt"),
    *("role", "is_admin", "isAdmin", "permission", "state", "lease_id", "token_hash", "__proto__"),
}
# Never more than a refusal, for the reason that stands behind it.
ALWAYS_REFUSED = {"execution_refuse_without_upgrade": "it is a WebSocket"}

BODIES: dict[str, Callable[[Ids], Any]] = {
    "Acquire": lambda ids: {"requestId": new_id(), "session": ids["session"], "slots": 1},
    "BuildCreate": lambda ids: {"workflowId": ids["workflow"]},
    "BuildRetry": lambda _: {"steps": "all"},
    "Cleaned": lambda _: {"cleanedAgeS": 0},
    "Completion": lambda _: {"status": "failed"},
    "DockerImageCreate": lambda _: {"slug": f"slug-{next(_NUMBERS)}", "imageUrl": "busybox:1"},
    "EnrolmentCreate": lambda _: {"name": "a farm"},
    "ExecutionProjectPatch": lambda ids: {"default_workflow_id": ids["workflow"]},
    "ExecutionCreate": lambda ids: {"project_id": ids["project"], "git_branch": "main"},
    "Heartbeat": lambda ids: {"session": ids["session"], "attempts": [_report(ids)]},
    "Listen": lambda ids: {"session": ids["session"]},
    "LogoutIn": lambda _: {},
    "LoginIn": lambda _: {"email": "split@acme.test", "password": PASSWORD},
    "MemberIn": lambda _: {"role": "viewer"},
    "NewSecret": lambda _: {"secretSha256": nothing_of("blob")},
    "Nothing": lambda _: {},
    "PasswordIn": lambda _: {"current_password": PASSWORD, "new_password": "another horse and staple"},
    "ProjectCreate": lambda ids: {"accountId": ids["account"], "name": "a project"},
    "ProjectPatch": lambda ids: {"defaultWorkflowId": ids["workflow"]},
    "RefreshIn": lambda _: {"refresh_token": "not known"},
    "Registration": lambda _: {"name": "a machine"},
    "Release": lambda _: {"reason": "not today"},
    "Reports": lambda ids: {
        "starts": [_told(ids)],
        # refused where it is one's own, as others need the step to run on
        "completions": [{**_told(ids), "status": "success", "exitCode": 3}],
    },
    "Resume": lambda ids: {"session": ids["session"], "attempts": [_report(ids)]},
    "SecretPut": lambda _: {"value": "not to be told"},
    "SourceResolved": lambda _: {"commit": "0" * 40},
    "Start": lambda _: {},
    "TenantIn": lambda _: {"accountId": f"account-{next(_NUMBERS)}"},
    "TicketIn": lambda ids: {"build_id": ids["build"]},
    "TokenIn": lambda _: {"name": "a token", "permissions": ["build:read"]},
    "UserIn": lambda _: {"email": f"user{next(_NUMBERS)}@acme.test", "password": PASSWORD},
    "UserPatch": lambda _: {"name": "another name"},
    "WorkflowBody": lambda _: {"name": "a workflow", "steps": [a_step()]},
}
QUERIES: dict[str, Callable[[Ids], dict[str, Any]]] = {
    "AppendQuery": lambda _: {"offset": 0},
    "AuditQuery": lambda ids: {"projectId": ids["project"]},
    "ByAccount": lambda ids: {"accountId": ids["account"]},
    "ExecutionQuery": lambda ids: {"project_id": ids["project"]},
    "TenantQuery": lambda ids: {"account": ids["account"]},
}


def _report(ids: Ids) -> dict[str, Any]:
    return {**_told(ids), "phase": "running"}


def _told(ids: Ids) -> dict[str, Any]:
    return {"stepId": ids["step"], "attempt": int(ids["attempt"]), "lease": ids["lease"]}


@dataclass(frozen=True)
class Place:
    """Where a route takes an id: a parameter of the path or a field, and what that stands for."""

    name: str
    kind: str


def places_in_path(endpoint: Endpoint) -> list[Place]:
    segments = endpoint.path.split("/")
    return [
        Place(segment.strip("{}"), KINDS[before])
        for before, segment in itertools.pairwise(segments)
        if segment.startswith("{")
    ]


def places_in_fields(endpoint: Endpoint) -> list[Place]:
    models = [model for model in (endpoint.body, endpoint.query) if model is not None]
    fields = [place for model in models for place in _fields_of(model)]
    return [Place(name, NAMED[model, name]) for model, name in fields if (model, name) not in NAMING_NOTHING]


def _fields_of(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Each field whose name says that it names something, also below."""
    for name, about in model.model_fields.items():
        if re.search(r"(^|_)(ids?|account)$|[a-z]Ids?$", name):
            yield model.__name__, name
        for part in _models_in(about.annotation):
            yield from _fields_of(part)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def is_leased(endpoint: Endpoint) -> bool:
    """A route by which a runner speaks of a step that it holds."""
    return endpoint.policy.audience is Audience.RUNNER and "{stepId}" in endpoint.path


def may_be_leased(endpoint: Endpoint) -> bool:
    return "{stepId}" in endpoint.path


@dataclass
class World:
    """One coordinator with two estates, and what was answered in it."""

    client: httpx.Client
    open_client: httpx.Client
    mill: Mill
    write_omitted: Callable[[], None]
    mine: Estate
    theirs: Estate
    askers: list[Asker]
    reached: set[str] = field(default_factory=set)

    def named(self, ids: Ids, held: Held | None) -> Ids:
        """The ids with all that a request about them has to say beside."""
        held = held or self.mine.held
        assert held is not None
        proof = {"attempt": str(held.proof.attempt), "lease": held.proof.lease}
        return {**self.mine.ids, **proof, "session": held.runner.session, **ids}

    def ask(
        self,
        endpoint: Endpoint,
        asker: Asker,
        ids: Ids,
        held: Held | None = None,
        *,
        is_open: bool = False,
        is_proving: bool = False,
        more: Mapping[str, Any] | None = None,
    ) -> httpx.Response:
        ids = self.named(ids, held)
        headers = dict(asker.headers)
        if endpoint.policy.scope is Scope.HEADER or self._must_choose(endpoint, asker):
            headers.setdefault("X-Tenant-ID", self.mine.tenant)
        if is_leased(endpoint) or (asker.runner_of is not None and may_be_leased(endpoint) and is_proving):
            headers |= {"X-Attempt": ids["attempt"], "X-Lease": ids["lease"]}
        said: dict[str, Any] = {}
        if endpoint.takes_stream and endpoint.method != "GET":
            said["content"] = self.mine.data if endpoint.method == "PUT" else b"a line\n"
        elif endpoint.body is not None:
            said["json"] = BODIES[endpoint.body.__name__](ids) | (more or {})
        if endpoint.query is not None and endpoint.query.__name__ in QUERIES:
            said["params"] = QUERIES[endpoint.query.__name__](ids)
        path = endpoint.path
        for place in places_in_path(endpoint):
            path = path.replace("{" + place.name + "}", ids[place.kind])
        client = self.open_client if is_open else self.client
        return client.request(endpoint.method, path, headers=headers, **said)

    def _must_choose(self, endpoint: Endpoint, asker: Asker) -> bool:
        return endpoint.policy.scope is Scope.TENANT and asker.may is not None and len(asker.may) > 1

    def rows(self) -> dict[str, list[str]]:
        """Every row there is, but for the trail and for when runners were heard of."""
        tables = [
            table for table in Row.metadata.sorted_tables if table.name not in ("audit_logs", "runners")
        ]
        return {table.name: self.mill.tx(_rows_of, table) for table in tables}


def _rows_of(tx: Any, table: Any) -> list[str]:
    return sorted(map(str, tx.connection().execute(table.select()).all()))


@pytest.fixture(scope="module", params=BOTH)
def world(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, portal: BlockingPortal
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("matrix")
    if request.param == "sqlite":
        shutil.copyfile(request.getfixturevalue("migrated_sqlite"), folder / "buildmill.db")
        database = open_database(f"sqlite:///{folder / 'buildmill.db'}")
    else:
        database = open_database(request.getfixturevalue("new_postgres_url")("matrix"), readers=8, writers=16)
        migrate(database)
    settings = Settings(data=folder / "data", auth="token", rate_limit=0, rate_limit_peer=0)
    clock = SettableClock()
    apps = [
        create_app(settings.model_copy(update={"auth": auth}), database=database, clock=clock)
        for auth in ("token", "open")
    ]
    clients = [
        httpx.Client(transport=InProcess(app, portal), base_url="http://localhost:3000") for app in apps
    ]
    mill = Mill(apps[0].state.coordinator, clock)
    mine, theirs = an_estate(mill, "acme"), an_estate(mill, "other")
    write_omitted = apps[0].state.denials.write_omitted
    yield World(
        *clients,
        mill,
        lambda: portal.call(write_omitted),
        mine,
        theirs,
        askers(mill, mine, theirs),
    )
    for client in clients:
        client.close()
    for app in apps:
        app.state.coordinator.lanes.close()
    database.dispose()


# Whom a route lets in, by its policy alone


def refusal_for(world: World, endpoint: Endpoint, asker: Asker, *, is_mine: bool = True) -> int | None:
    """The status by which a route turns somebody away; None for who is let in."""
    policy, mine = endpoint.policy, world.mine.tenant
    if policy.audience is Audience.ANYONE:
        return None
    if policy.audience is Audience.RUNNER:
        if asker.runner_of is None:
            return 401
        return None if is_mine == (asker.runner_of == mine) or "{stepId}" not in endpoint.path else 404
    if policy.audience is Audience.ENROLMENT:
        return None if asker.enrols or asker.name.startswith("operator") else 401
    if not asker.is_user:
        return 401
    if policy.scope is Scope.NOTHING:
        return None
    if policy.scope is Scope.INSTALLATION:
        return None if asker.is_operator else 403
    if asker.may is not None and not _may(world, endpoint, asker, is_mine=is_mine):
        return 403
    if is_mine or (asker.is_operator and asker.about is None and policy.scope is not Scope.HEADER):
        return None
    return 404


def _may(world: World, endpoint: Endpoint, asker: Asker, *, is_mine: bool) -> bool:
    """Whether somebody has the permission where it counts: here, or anywhere before it is known where."""
    assert asker.may is not None
    permission, mine = endpoint.policy.permission, world.mine.tenant
    is_settled = len(asker.may) == 1 or asker.about or endpoint.policy.scope in (Scope.HEADER, Scope.TENANT)
    if is_mine or is_settled:
        return permission in asker.may[mine]
    return any(permission in here for here in asker.may.values())


def told(answer: httpx.Response, *names: str) -> tuple[int, dict[str, str], Any]:
    """What an answer tells, but for when it was given and the ids that were sent."""
    content = answer.text
    for name in names:
        content = content.replace(name, "<id>")
    if answer.headers.get("content-type") == "application/json":
        body = json.loads(content) if content else None
        if isinstance(body, dict):
            body = {key: value for key, value in body.items() if key not in ("timestamp", "trace_id")}
    else:
        body = content
    headers = {name: value for name, value in answer.headers.items() if name != "date"}
    return answer.status_code, headers, body


# The table is whole


def test_every_route_says_who_may_use_it_and_about_which_tenant() -> None:
    for endpoint in ALL_ENDPOINTS:
        policy = endpoint.policy
        assert isinstance(policy, Policy), endpoint.name
        assert policy.permission, endpoint.name
        if policy.audience in (Audience.USER, Audience.STEP):
            names_something = bool(places_in_path(endpoint) + places_in_fields(endpoint))
            assert not names_something or policy.scope is not Scope.NOTHING, endpoint.name


def test_every_id_that_a_route_takes_is_one_we_can_make() -> None:
    """Fails with the place that is new: the word before a parameter, or the field of a model."""
    kinds = {place.kind for one in ALL_ENDPOINTS for place in places_in_path(one) + places_in_fields(one)}

    assert kinds <= {*KINDS.values(), *NAMED.values()}


def test_every_body_and_every_query_that_a_route_needs_is_one_we_can_make() -> None:
    for endpoint in ALL_ENDPOINTS:
        if endpoint.body is not None:
            assert endpoint.body.__name__ in BODIES, f"no body for {endpoint.name}"
        if endpoint.query is not None:
            has_to_be_said = any(field.is_required() for field in endpoint.query.model_fields.values())
            assert endpoint.query.__name__ in QUERIES or not has_to_be_said, f"no query for {endpoint.name}"


def test_nothing_answers_but_the_routes_of_the_table(world: World) -> None:
    known = {endpoint.path for endpoint in ALL_ENDPOINTS}
    app: Any = world.client._transport._app  # type: ignore[attr-defined]

    assert {route.path for route in app.routes} <= known


# Things of others


def combinations(endpoint: Endpoint) -> Iterator[Sequence[Place]]:
    """Each id of the path alone and all of them together; each field by itself."""
    if endpoint.name in ALWAYS_REFUSED:
        return
    path = [place for place in places_in_path(endpoint) if place.kind not in NAMES | OF_NO_TENANT]
    for count in range(1, len(path) + 1):
        yield from itertools.combinations(path, count)
    for place in places_in_fields(endpoint):
        yield [place]


def foreign_ids(world: World, places: Sequence[Place], *, with_gone: bool) -> Iterator[Ids]:
    """Those of what the other tenant has, and of what it had."""
    yield {place.kind: world.theirs.ids[place.kind] for place in places}
    if with_gone and len(places) == 1:
        for gone in world.theirs.gone.get(places[0].kind, ()):
            yield {places[0].kind: gone}


@pytest.mark.threat("A12")
@pytest.mark.threat("A13")
def test_a_thing_of_others_reads_as_if_it_were_not_there(world: World) -> None:
    before = world.rows()

    wrong = [
        f"{asker.name}: {endpoint.method} {endpoint.path} {[place.name for place in places]}: {why}"
        for endpoint in ALL_ENDPOINTS
        for places in combinations(endpoint)
        for asker in world.askers
        for why in look_like_nothing(world, endpoint, asker, places)
    ]

    assert not wrong, "\n".join(wrong)
    assert {name: rows for name, rows in world.rows().items() if rows != before[name]} == {}


def look_like_nothing(
    world: World, endpoint: Endpoint, asker: Asker, places: Sequence[Place]
) -> Iterator[str]:
    """What is wrong with how somebody is answered who names what belongs to the other tenant."""
    is_beside_ones_own = places_in_path(endpoint) != [] and places_in_path(endpoint)[0] not in places
    expected = refusal_for(world, endpoint, asker, is_mine=is_beside_ones_own)
    if asker.runner_of == world.theirs.tenant and endpoint.policy.audience is Audience.RUNNER:
        return  # there it is the owner; what it may with things of mine stands below
    is_everywhere = asker.about is None or endpoint.policy.scope is Scope.INSTALLATION
    if expected is None and asker.is_operator and is_everywhere:
        return
    if expected in (404, None):
        expected = INSTEAD_OF_404.get((endpoint.name, places[0].name), 404)
    if expected == 401 and asker.name != "nobody":
        return  # before any id is looked at; what each of them is answered stands below
    nothing = {place.kind: nothing_of(place.kind) for place in places}
    absent = world.ask(endpoint, asker, nothing)
    if absent.status_code != expected:
        yield f"{absent.status_code} where {expected} was expected: {absent.text}"
    for ids in foreign_ids(world, places, with_gone=asker.name == "owner"):
        foreign = world.ask(endpoint, asker, ids)
        same = told(absent, *nothing.values()) == told(foreign, *ids.values())
        if not same:
            yield f"{told(foreign)} is not {told(absent)}"


@pytest.mark.threat("A12")
def test_a_runner_of_another_tenant_finds_no_step(world: World) -> None:
    (stranger,) = [asker for asker in world.askers if asker.runner_of == world.theirs.tenant]
    leased = [endpoint for endpoint in ALL_ENDPOINTS if may_be_leased(endpoint)]
    before = world.rows()

    for endpoint in leased:
        nothing = nothing_of("step")
        absent = world.ask(endpoint, stranger, {"step": nothing}, is_proving=True)
        foreign = world.ask(endpoint, stranger, {}, is_proving=True)

        step = world.mine.ids["step"]
        assert absent.status_code == 404, endpoint.path
        assert told(foreign, step) == told(absent, nothing), endpoint.path
    assert len(leased) >= 10
    assert world.rows() == before


@pytest.mark.threat("A12")
def test_who_reaches_for_things_of_others_is_written_down(world: World) -> None:
    world.mill.clock.advance(5)
    asker = next(asker for asker in world.askers if asker.name == "owner")
    world.write_omitted()
    for endpoint in ALL_ENDPOINTS:
        is_hidden = refusal_for(world, endpoint, asker, is_mine=False) == 404
        if not is_hidden or not places_in_path(endpoint) or endpoint.name in ALWAYS_REFUSED:
            continue
        before = len(world.mill.audited("access.denied"))
        world.mill.clock.advance(5)
        world.ask(endpoint, asker, world.theirs.ids)
        world.write_omitted()

        rows = world.mill.audited("access.denied")[before:]
        whose = [(row.actor, row.tenant_id) for row in rows]
        assert whose == [(f"user:{asker.user}", world.mine.tenant)], endpoint.name


# Things of one's own


@pytest.mark.threat("A12")
def test_everybody_may_exactly_what_the_roles_say(world: World) -> None:
    wrong = [
        f"{asker.name}: {endpoint.method} {endpoint.path}: {why}"
        for endpoint in ALL_ENDPOINTS
        for asker in sorted(world.askers, key=lambda one: refusal_for(world, endpoint, one) is None)
        for why in look_like_ones_own(world, endpoint, asker)
    ]

    assert not wrong, "\n".join(wrong)
    never = {endpoint.name for endpoint in ALL_ENDPOINTS} - world.reached
    assert never == {*ALWAYS_REFUSED, "execution_refresh_login"} | OF_ONESELF


def look_like_ones_own(world: World, endpoint: Endpoint, asker: Asker) -> Iterator[str]:
    expected = refusal_for(world, endpoint, asker)
    if expected is None and endpoint.name in OF_ONESELF:
        return
    ids, held = things_for(world, endpoint, asker) if expected is None else ({}, None)
    answer = world.ask(endpoint, asker, ids, held)
    if answer.status_code < 400:
        world.reached.add(endpoint.name)
    if expected is not None and answer.status_code != expected:
        yield f"{answer.status_code} where {expected} was expected: {answer.text}"
    is_let_in = answer.status_code not in (401, 403, 404) and answer.status_code < 500
    if expected is None and not is_let_in and endpoint.name != "execution_refresh_login":
        yield f"{answer.status_code}, and should be let in: {answer.text}"


def things_for(world: World, endpoint: Endpoint, asker: Asker) -> tuple[Ids, Held | None]:
    """What a route may do its work on: the standing things for who only looks, else a fresh one."""
    if is_leased(endpoint) and endpoint.method != "GET" and endpoint.method != "HEAD":
        held = world.mine.a_held_step(begun=endpoint.name != "release_step")
        return {"step": held.step_id}, held
    if endpoint.method in ("GET", "HEAD"):
        return {}, None
    if endpoint.policy.audience is Audience.STEP:
        return world.mine.another("build"), None
    places = places_in_path(endpoint)
    if not places:
        return {}, None
    kind = places[-1].kind
    if kind in ("tenant", "step"):
        return {}, None
    return world.mine.another(FRESH.get(endpoint.name, kind), asker.user), None


# The surface that wants a credential in open mode as well


@pytest.mark.threat("A12")
def test_open_access_opens_nothing_that_wants_a_credential(world: World) -> None:
    for endpoint in [endpoint for endpoint in ALL_ENDPOINTS if endpoint.needs_credential]:
        for asker in world.askers:
            expected = refusal_for(world, endpoint, asker)
            if expected is not None:
                answer = world.ask(endpoint, asker, {}, is_open=True)
                assert answer.status_code == expected, (asker.name, endpoint.path, answer.text)
            for place in places_in_path(endpoint) if endpoint.name not in ALWAYS_REFUSED else ():
                expected = refusal_for(world, endpoint, asker, is_mine=False)
                answer = world.ask(endpoint, asker, {place.kind: world.theirs.ids[place.kind]}, is_open=True)
                assert answer.status_code == expected, (asker.name, endpoint.path, answer.text)


# What nobody may say of a thing


@pytest.mark.threat("A14")
def test_no_body_says_whose_a_thing_is_or_what_it_became(world: World) -> None:
    askers = {asker.name: asker for asker in world.askers}
    whose = {Audience.RUNNER: "its runner", Audience.ENROLMENT: "enrolling machine"}
    before = world.rows()

    for endpoint in [endpoint for endpoint in ALL_ENDPOINTS if endpoint.body is not None]:
        assert endpoint.body is not None
        known = {alias for name, about in endpoint.body.model_fields.items() for alias in (name, about.alias)}
        asker = askers[whose.get(endpoint.policy.audience, "operator")]
        for name in SAID_BY_NOBODY - known:
            answer = world.ask(endpoint, asker, {}, more={name: new_id()})

            assert answer.status_code == 400, (endpoint.name, name, answer.text)
            details = answer.json()["details"]
            named = details if isinstance(details, dict) else {fault["path"] for fault in details}
            assert name in named, (endpoint.name, name, answer.text)
    assert world.rows() == before
