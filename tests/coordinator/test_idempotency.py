"""A creation that is sent again is answered again, and nothing is made twice."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select
from sqlmodel import Session
from starlette.applications import Starlette
from starlette.responses import Response

from coordinator.actions.change_project import change_project
from coordinator.actions.create_project import create_project
from coordinator.api.auth import Doorkeeper
from coordinator.api.denials import Denials
from coordinator.api.dispatch import Application, TreeRouter
from coordinator.api.endpoint import Answer, Call, json_answer, routes_of
from coordinator.api.executions.operations import operation
from coordinator.api.executions.shapes import Input, Shape
from coordinator.api.idempotency import make_once
from coordinator.api.state import AppState
from coordinator.chores import delete_old
from coordinator.errors import Conflict
from coordinator.rules.access import Audience, Caller, Policy, Scope
from coordinator.store.kept_answers import KEPT, delete_old_answers
from coordinator.tables import Project, table_of
from tests.factories import LOCAL, ON_SQLITE, Api, Mill, a_spec, together
from tests.fakes import SettableClock

THINGS = "/api/v1/things"
PROJECTS = table_of(Project)


class ThingIn(Input):
    account: str
    name: str = ""


class ThingOut(Shape):
    id: str
    name: str


class Things:
    """An operation that makes something; it may be told to fail, or to wait within its transaction."""

    def __init__(self) -> None:
        self.fails = False
        self.status = 201
        self.in_the_middle: Callable[[], None] = lambda: None

    def make(self, tx: Session, caller: Caller, *, account: str, name: str, now: datetime) -> Project:
        project, _ = create_project(tx, caller, account=account, name=name or "a thing", now=now)
        self.in_the_middle()
        if self.fails:
            raise Conflict("it cannot be made now")
        return project

    async def handle(self, call: Call) -> Response:
        def answer(project: Project) -> Response:
            return json_answer(ThingOut(id=project.id, name=project.name), self.status)

        body: ThingIn = call.body
        return await make_once(
            call, self.make, call.caller, account=body.account, name=body.name, answer=answer
        )

    def app(self, state: AppState) -> Starlette:
        policy = Policy(Audience.USER, "project:create", Scope.HEADER)
        ok = {201: Answer("Made", ThingOut)}
        endpoints = [
            operation(
                "POST", path, self.handle, "Make", tag="Things", policy=policy, body=ThingIn, ok=ok, name=path
            )
            for path in ("/things", "/others")
        ]
        routes = routes_of(endpoints, state, Doorkeeper(state), Denials(state))

        async def nothing(*_: Any) -> None:
            raise AssertionError("there is nothing else")

        return Application(TreeRouter(routes, default=nothing, lifespan=None))


class Maker:
    """Somebody who sends creations."""

    def __init__(self, client: httpx.Client, headers: dict[str, str]) -> None:
        self.client = client
        self.headers = headers

    def make(
        self, key: str | None = "key", /, *, path: str = THINGS, content: str | None = None, **body: str
    ) -> httpx.Response:
        headers = {**self.headers, "Content-Type": "application/json"}
        if key is not None:
            headers["Idempotency-Key"] = key
        if content is not None:
            return self.client.post(path, content=content, headers=headers)
        return self.client.post(path, json={"account": "acme", **body}, headers=headers)


@pytest.fixture
def things() -> Things:
    return Things()


@pytest.fixture
def client(
    things: Things, coordinator: AppState, new_client: Callable[[Starlette], httpx.Client]
) -> httpx.Client:
    return new_client(things.app(coordinator))


@pytest.fixture
def ann(client: httpx.Client, mill: Mill) -> Maker:
    return Maker(client, mill.a_member())


@pytest.fixture
def made(mill: Mill) -> Callable[[], int]:
    """How many things there are."""

    def count(tx: Session) -> int:
        return int(tx.connection().execute(select(func.count(PROJECTS.c.id))).scalar_one())

    return lambda: mill.tx(count)


@pytest.fixture
def kept(mill: Mill) -> Callable[[], int]:
    """How many answers are kept."""

    def count(tx: Session) -> int:
        return int(tx.connection().execute(select(func.count(KEPT.c.key))).scalar_one())

    return lambda: mill.tx(count)


def test_the_same_request_gets_the_same_answer_and_makes_nothing(ann: Maker, made: Callable[[], int]) -> None:
    first, second, third = ann.make(), ann.make(), ann.make()

    assert [one.status_code for one in (first, second, third)] == [201, 201, 201]
    assert first.content == second.content == third.content
    assert "Idempotent-Replay" not in first.headers
    assert second.headers["Idempotent-Replay"] == "true"
    assert second.headers["Content-Type"] == first.headers["Content-Type"]
    assert made() == 1


def test_without_a_key_each_request_makes_something(
    ann: Maker, made: Callable[[], int], kept: Callable[[], int]
) -> None:
    assert ann.make(None).json() != ann.make(None).json()
    assert made() == 2
    assert kept() == 0


def test_another_key_is_another_request(ann: Maker, made: Callable[[], int]) -> None:
    assert ann.make("one").json() != ann.make("two").json()
    assert ann.make("One").headers.get("Idempotent-Replay") is None
    assert made() == 3


def test_the_same_key_with_another_body_or_path_is_refused(ann: Maker, made: Callable[[], int]) -> None:
    ann.make(name="one")

    for refused in (ann.make(name="two"), ann.make(), ann.make(path="/api/v1/others", name="one")):
        assert refused.status_code == 409
        assert refused.json()["code"] == "CONFLICT"
        assert "Idempotency-Key" in refused.json()["error"]
    assert ann.make(name="one").headers["Idempotent-Replay"] == "true"
    assert made() == 1


@ON_SQLITE
def test_another_order_of_the_fields_is_the_same_body(ann: Maker, made: Callable[[], int]) -> None:
    first = ann.make(content='{"account": "acme", "name": "\u00fc"}')
    second = ann.make(content='{ "name":"\\u00fc",  "account":"acme" }')

    assert second.headers["Idempotent-Replay"] == "true"
    assert second.content == first.content
    assert made() == 1


def test_a_key_belongs_to_its_user_in_its_tenant(
    client: httpx.Client, mill: Mill, made: Callable[[], int]
) -> None:
    ann = mill.a_user("ann@acme.test", acme="owner", other="owner")
    in_acme = Maker(client, {**mill.a_login(ann), "X-Tenant-ID": mill.a_tenant("acme")})
    again = Maker(client, {**mill.a_login(ann), "X-Tenant-ID": mill.a_tenant("acme")})
    in_other = Maker(client, {**mill.a_login(ann), "X-Tenant-ID": mill.a_tenant("other")})
    bob = Maker(client, mill.a_member())
    program = Maker(
        client, {**mill.an_api_token("acme", "project:create"), "X-Tenant-ID": mill.a_tenant("acme")}
    )

    first = in_acme.make()
    others = [in_other.make(account="other"), bob.make(), program.make()]

    assert again.make().content == first.content
    assert not any("Idempotent-Replay" in other.headers for other in others)
    assert made() == 4


@ON_SQLITE
@pytest.mark.parametrize("key", ["", " ", "a b", "\x7f", "x" * 256, "caf\u00e9", "a\tb"])
def test_a_key_is_visible_ascii_of_bounded_length(ann: Maker, made: Callable[[], int], key: str) -> None:
    refused = ann.client.post(
        THINGS,
        json={"account": "acme"},
        headers={**ann.headers, "Idempotency-Key": key.encode("latin-1")},  # type: ignore[dict-item]
    )

    assert refused.status_code == 400
    assert refused.json()["details"] == {"Idempotency-Key": "must be 1 to 255 visible characters of ASCII"}
    assert made() == 0


@ON_SQLITE
@pytest.mark.parametrize("key", ["x", "~" * 255, "!", '"quoted"', "a,b"])
def test_every_visible_character_may_stand_in_a_key(ann: Maker, key: str) -> None:
    assert ann.make(key).status_code == 201
    assert ann.make(key).headers["Idempotent-Replay"] == "true"


@ON_SQLITE
def test_a_key_is_sent_once(ann: Maker, made: Callable[[], int]) -> None:
    twice = [*ann.headers.items(), ("Idempotency-Key", "a"), ("Idempotency-Key", "a")]

    assert ann.client.post(THINGS, json={"account": "acme"}, headers=twice).status_code == 400
    assert made() == 0


def test_an_error_is_not_kept(
    ann: Maker, things: Things, made: Callable[[], int], kept: Callable[[], int]
) -> None:
    things.fails = True
    refused = [ann.make(), ann.make()]
    left = kept()
    things.fails = False

    assert [one.status_code for one in refused] == [409, 409]
    assert "cannot be made" in refused[1].json()["error"]
    assert left == 0
    assert ann.make().status_code == 201
    assert made() == 1


@ON_SQLITE
def test_an_answer_that_is_no_success_is_not_kept(
    ann: Maker, things: Things, kept: Callable[[], int]
) -> None:
    things.status = 300

    assert ann.make().status_code == 300
    assert kept() == 0


def test_the_same_request_many_times_at_once_makes_one_thing(ann: Maker, made: Callable[[], int]) -> None:
    answers = together(*[ann.make] * 8)

    assert [answer.status_code for answer in answers if isinstance(answer, httpx.Response)] == [201] * 8
    assert len({answer.content for answer in answers if isinstance(answer, httpx.Response)}) == 1
    assert made() == 1


def test_many_bodies_under_one_key_at_once_make_one_thing(ann: Maker, made: Callable[[], int]) -> None:
    answers = together(*[partial(ann.make, name=f"thing {number}") for number in range(6)])

    statuses = [answer.status_code for answer in answers if isinstance(answer, httpx.Response)]
    assert sorted(statuses) == [201] + [409] * 5
    assert made() == 1


def test_who_asks_while_the_first_one_fails_makes_it_itself(
    ann: Maker, things: Things, made: Callable[[], int]
) -> None:
    begun, fail = threading.Event(), threading.Event()

    def fail_the_first() -> None:
        things.in_the_middle = lambda: None
        begun.set()
        assert fail.wait(30)
        raise Conflict("it cannot be made now")

    def ask_meanwhile() -> httpx.Response:
        assert begun.wait(30)
        threading.Timer(0.2, fail.set).start()
        return ann.make()

    things.in_the_middle = fail_the_first
    first, second = together(ann.make, ask_meanwhile)

    assert isinstance(first, httpx.Response)
    assert isinstance(second, httpx.Response)
    assert [first.status_code, second.status_code] == [409, 201]
    assert "Idempotent-Replay" not in second.headers
    assert made() == 1


def test_an_answer_outlives_the_process_that_gave_it(
    ann: Maker, things: Things, new_app: Any, new_client: Any, settings: Any, made: Callable[[], int]
) -> None:
    ann.client._transport.lose_answers = 1  # type: ignore[attr-defined]
    with pytest.raises(httpx.ReadError):
        ann.make()

    restarted = things.app(new_app(settings).state.coordinator)
    again = Maker(new_client(restarted), ann.headers).make()

    assert again.status_code == 201
    assert again.headers["Idempotent-Replay"] == "true"
    assert made() == 1


def test_an_answer_is_kept_for_a_day(
    client: httpx.Client, mill: Mill, clock: SettableClock, made: Callable[[], int]
) -> None:
    operator = Maker(client, {**mill.operator, "X-Tenant-ID": mill.a_tenant("acme")})
    first = operator.make()
    clock.advance(24 * 3600 - 1)
    within = operator.make()
    clock.advance(1)
    after = operator.make(name="another")

    assert within.content == first.content
    assert after.status_code == 201
    assert operator.make(name="another").content == after.content
    assert made() == 2


async def test_what_is_kept_no_longer_is_deleted_batch_by_batch(
    client: httpx.Client, mill: Mill, clock: SettableClock, kept: Callable[[], int]
) -> None:
    operator = Maker(client, {**mill.operator, "X-Tenant-ID": mill.a_tenant("acme")})
    for number in range(5):
        operator.make(f"old-{number}")
    clock.advance(23 * 3600)
    operator.make("new")
    clock.advance(3600)

    await delete_old(mill.state, partial(delete_old_answers, at_once=2))

    assert kept() == 1
    assert operator.make("new").headers["Idempotent-Replay"] == "true"


# Over the surface itself


BUILDS = "/api/v1/builds"
START_S = 60.0


@pytest.fixture
def surface(app: Starlette, new_client: Callable[[Starlette], httpx.Client], mill: Mill) -> Maker:
    return Maker(new_client(app), mill.a_member())


def a_buildable_project(mill: Mill) -> str:
    project = mill.a_project("acme")
    mill.a_workflow(project, a_spec())
    mill.now(change_project, mill.site, LOCAL, project, {"repo_url": "https://git.example/o/r"})
    return project


def test_one_build_is_made_by_many_creations_at_once(surface: Maker, mill: Mill) -> None:
    body = {"project_id": a_buildable_project(mill), "git_branch": "main"}
    headers = {**surface.headers, "Idempotency-Key": "nightly"}

    answers = together(*[partial(surface.client.post, BUILDS, json=body, headers=headers)] * 6)

    assert {answer.status_code for answer in answers if isinstance(answer, httpx.Response)} == {201}
    assert len({answer.content for answer in answers if isinstance(answer, httpx.Response)}) == 1
    assert surface.client.get(BUILDS, headers=surface.headers).json()["total_count"] == 1


def test_the_same_build_written_otherwise_is_the_same_request(surface: Maker, mill: Mill) -> None:
    body: dict[str, Any] = {"project_id": a_buildable_project(mill), "git_branch": "main"}
    headers = {**surface.headers, "Idempotency-Key": "nightly"}
    first = surface.client.post(BUILDS, json=body, headers=headers)

    in_capitals = {**body, "project_id": body["project_id"].upper()}
    same = [
        surface.client.post(BUILDS, json=written, headers=headers)
        for written in (in_capitals, {**body, "git_commit": None})
    ]
    other = surface.client.post(BUILDS, json={**body, "git_commit": "a" * 40}, headers=headers)

    assert [answer.content for answer in same] == [first.content] * 2
    assert other.status_code == 409
    assert surface.client.get(BUILDS, headers=surface.headers).json()["total_count"] == 1


def test_a_build_is_retried_once_with_and_without_an_empty_body(surface: Maker, mill: Mill) -> None:
    body = {"project_id": a_buildable_project(mill), "git_branch": "main"}
    build = surface.client.post(BUILDS, json=body, headers=surface.headers).json()["id"]
    surface.client.post(f"{BUILDS}/{build}/cancel", headers=surface.headers)
    headers = {**surface.headers, "Idempotency-Key": "again"}

    first = surface.client.post(f"{BUILDS}/{build}/retry", headers=headers)
    second = surface.client.post(f"{BUILDS}/{build}/retry", headers=headers, json={})

    assert first.status_code == 201
    assert second.content == first.content
    assert second.headers["Idempotent-Replay"] == "true"
    assert surface.client.get(BUILDS, headers=surface.headers).json()["total_count"] == 2


class Mortal:
    """A coordinator in a process of its own, which is killed without a warning."""

    def __init__(self, data: Path, said: Path) -> None:
        argv = [sys.executable, "-m", "coordinator", "coordinator", "--port", "0", "--data", str(data)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with said.open("w") as output:
            self.process = subprocess.Popen(argv, stdout=output, stderr=output, env=environment)
        self.said = said
        self.client = httpx.Client(trust_env=False, transport=httpx.HTTPTransport(retries=10), timeout=30)

    def wait_for_address(self) -> None:
        ends = time.monotonic() + START_S
        while (found := re.search(r"coordinator: (http://\S+)", self.said.read_text())) is None:
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < ends, self.said.read_text()
            time.sleep(0.05)
        self.client.base_url = httpx.URL(found[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@pytest.fixture
def new_life(tmp_path: Path) -> Iterator[Callable[[], Mortal]]:
    lives: list[Mortal] = []

    def begin() -> Mortal:
        lives.append(Mortal(tmp_path / "data", tmp_path / f"life-{len(lives)}"))
        lives[-1].wait_for_address()
        return lives[-1]

    yield begin
    for life in lives:
        life.kill()
        life.client.close()


def test_a_kill_in_a_flood_of_creations_loses_no_answer_and_doubles_no_build(
    new_life: Callable[[], Mortal], tmp_path: Path
) -> None:
    first = new_life()
    api = Api(first.client)
    project = api.a_project()
    api.a_workflow(project_id=project["id"])
    first.client.patch(f"/api/projects/{project['id']}", json={"repoUrl": "https://git.example/o/r"})
    operator = {"Authorization": f"Bearer {(tmp_path / 'data/keys/admin-token').read_text().strip()}"}
    tenants = first.client.get("/api/tenants?account=acme", headers=operator).json()
    headers = {**operator, "X-Tenant-ID": tenants[0]["id"]}
    body = {"project_id": project["id"], "git_branch": "main"}
    keys = [f"key-{number}" for number in range(120)]
    answered: dict[str, bytes] = {}
    enough = threading.Event()

    def create(life: Mortal, key: str) -> bytes:
        answer = life.client.post(BUILDS, json=body, headers={**headers, "Idempotency-Key": key})
        assert answer.status_code == 201, answer.text
        return answer.content

    def flood(some: list[str]) -> None:
        for key in some:
            try:
                answered[key] = create(first, key)
            except httpx.TransportError:
                return
            if len(answered) >= 10:
                enough.set()

    threads = [threading.Thread(target=flood, args=(keys[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(60)
    first.kill()
    for thread in threads:
        thread.join(60)

    second = new_life()
    again = {key: create(second, key) for key in keys}

    assert len(answered) < len(keys)
    assert {key: again[key] for key in answered} == answered
    assert second.client.get(BUILDS, headers=headers).json()["total_count"] == len(keys)
