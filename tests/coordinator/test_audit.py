"""Every change a user can see leaves a row, and looking leaves none."""

from dataclasses import replace
from typing import Any

import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.release_step import release_step
from coordinator.actions.say_bye import say_bye
from coordinator.actions.seal_trail import seal_trail
from coordinator.api.denials import MAX_ADDRESSES, MAX_SUSPECTS, Denials
from coordinator.rules.access import Audience, Caller
from coordinator.settings import Settings
from shared.ids import new_id
from tests.factories import LOCAL, ON_SQLITE, Api, HeldOverHttp, Mill, a_spec
from tests.fakes import SettableClock


def actions(mill: Mill) -> list[str]:
    return [row.action for row in mill.audited()]


def test_every_change_is_written_down_with_who_made_it(api: Api, mill: Mill) -> None:
    project = api.a_project()
    path = f"/api/projects/{project['id']}"
    workflow = api.a_workflow(project_id=project["id"])
    api.client.patch(path, json={"name": "new"})
    api.client.put(f"{path}/workflows/{workflow['id']}", json={"name": "w", "steps": a_spec()})
    build = api.post(f"{path}/builds", {"workflowId": workflow["id"]})
    runner = api.a_runner()
    held = HeldOverHttp(api.client, api.acquire(runner)[0], runner)
    held.post("start", {})
    held.complete()
    second = api.post(f"{path}/builds", {"workflowId": workflow["id"]})
    api.client.post(f"/api/builds/{second['id']}/cancel")
    api.client.delete(f"{path}/workflows/{workflow['id']}")
    api.client.delete(f"/api/docker-images/{api.an_image()['id']}")
    api.client.delete(path)

    rows = mill.audited()

    assert [(row.action, row.actor.partition(":")[0]) for row in rows] == [
        ("project.created", "local"),
        ("image.created", "local"),
        ("workflow.created", "local"),
        ("project.changed", "local"),
        ("workflow.changed", "local"),
        ("build.created", "local"),
        ("runner.registered", "local"),
        ("step.claimed", "system"),
        ("step.started", "runner"),
        ("step.finished", "runner"),
        ("build.finished", "system"),
        ("build.created", "local"),
        ("build.cancelled", "local"),
        ("build.finished", "system"),
        ("workflow.deleted", "local"),
        ("image.deleted", "local"),
        ("project.deleted", "local"),
    ]
    assert {row.address for row in rows if row.actor == "local"} == {"127.0.0.1"}
    assert build["id"] in {row.details.get("buildId") for row in rows}


def test_looking_and_polling_leave_nothing(api: Api, mill: Mill) -> None:
    held = api.a_running_step()
    before = actions(mill)

    for path in ("/api/docker-images", "/api/runners", "/api/audit-logs", "/api/projects?accountId=acme"):
        api.get(path)
    api.build(held.claim["buildId"])
    held.append(0, b"bytes")
    api.acquire(held.runner)
    api.client.post("/api/runner/heartbeat", json={"session": "the-session"}, headers=held.runner)
    api.client.get(f"/api/runner/{held.step_id}")

    assert actions(mill) == before


def test_what_was_refused_leaves_no_row_of_a_change(api: Api, mill: Mill) -> None:
    held = api.a_running_step()
    before = actions(mill)

    held.complete(logSize=99)
    api.client.post("/api/docker-images", json={"slug": "box", "imageUrl": "busybox:1"})
    api.client.delete(f"/api/docker-images/{api.an_image()['id']}")
    api.client.post(f"/api/runner/{held.step_id}/complete", json={"status": "success"})

    assert actions(mill) == before


def test_steps_that_are_lost_or_given_up_are_written_down(mill: Mill) -> None:
    mill.clock.advance(100)
    held = mill.a_running_step()
    mill.clock.advance(61)
    mill.expire()
    assert actions(mill)[-1] == "step.requeued"
    mill.clock.advance(10)
    again = mill.acquire(held.runner)[0]
    mill.start(again)
    mill.now(cancel_build, mill.site, LOCAL, mill.step(held.step_id).build_id)
    mill.clock.advance(25)
    mill.expire()

    assert actions(mill)[-3:] == ["build.cancelled", "step.finished", "build.finished"]


def test_the_start_of_a_step_and_the_commit_of_its_build_are_written_down_once(api: Api, mill: Mill) -> None:
    api.a_build(a_spec(one=[], two=[]), repoUrl="https://example.org/r.git")
    runner = api.a_runner()
    one, two = (HeldOverHttp(api.client, claim, runner) for claim in api.acquire(runner, slots=2))
    before = len(actions(mill))

    for held, commit in ((one, "a" * 40), (two, "b" * 40)):
        held.post("source", {"commit": commit})
    for _ in range(2):
        one.post("start", {})

    rows = mill.audited()[before:]
    assert [row.action for row in rows] == ["build.commit_bound", "step.started"]
    assert rows[0].details == {"buildId": one.claim["buildId"], "commit": "a" * 40}
    assert rows[1].details == {"stepId": one.step_id, "attempt": 1}
    assert {row.actor for row in rows} == {f"runner:{mill.step(one.step_id).runner_id}"}


def test_a_step_that_is_given_back_is_written_down_with_who_gave_it(mill: Mill) -> None:
    held = mill.an_acquired_step()
    said: dict[str, str] = {"reason": "no room"}
    mill.now(release_step, mill.site, held.runner.caller, held.step_id, held.proof, **said)
    mill.acquire(held.runner)
    mill.now(say_bye, mill.site, held.runner.caller)
    mill.acquire(held.runner)
    mill.clock.advance(21)
    mill.expire()

    rows = [row for row in mill.audited() if row.action in ("step.released", "step.requeued")]
    runner = held.runner.caller.actor
    assert [(row.action, row.actor, row.details["attempt"]) for row in rows] == [
        ("step.released", runner, 1),
        ("step.released", runner, 2),
        ("step.requeued", "system", 3),
    ]
    assert [row.details.get("reason") for row in rows] == ["no room", None, "unclaimed"]


def test_a_claim_that_is_cancelled_on_its_way_back_has_finished(mill: Mill) -> None:
    held = mill.an_acquired_step()
    mill.now(cancel_build, mill.site, LOCAL, mill.step(held.step_id).build_id)
    mill.now(say_bye, mill.site, held.runner.caller)

    assert actions(mill)[-3:] == ["build.cancelled", "step.finished", "build.finished"]
    assert mill.audited("step.finished")[0].details["state"] == "cancelled"


@pytest.mark.parametrize("comes_back", ["heartbeat", "complete"])
def test_an_attempt_that_comes_back_is_written_down(mill: Mill, comes_back: str) -> None:
    mill.clock.advance(100)
    held = mill.a_running_step()
    mill.heartbeat(held.runner, held)
    mill.clock.advance(61)
    mill.expire()

    if comes_back == "heartbeat":
        mill.heartbeat(held.runner, held)
    mill.complete(held)

    ways = [row for row in mill.audited() if row.details.get("stepId") == held.step_id]
    assert [row.action for row in ways] == [
        "step.claimed",
        "step.started",
        "step.requeued",
        "step.revived",
        "step.finished",
    ]
    assert ways[3].actor == held.runner.caller.actor


def test_a_failure_of_the_machine_is_a_requeue_and_no_end(mill: Mill) -> None:
    held = mill.a_running_step()
    mill.complete(held, "failed", reason="internal")

    row = mill.audited()[-1]
    assert (row.action, row.actor) == ("step.requeued", held.runner.caller.actor)
    assert row.details == {"stepId": held.step_id, "attempt": 1, "reason": "internal"}
    assert mill.audited("step.finished") == []


def test_the_trail_can_be_read_in_pages_and_by_what_was_done(api: Api) -> None:
    project = api.a_project()
    api.a_project("other")

    everything = api.get("/api/audit-logs")
    mine = api.get(f"/api/audit-logs?projectId={project['id']}")
    made = api.get("/api/audit-logs?action=project.created&limit=1")

    assert [row["action"] for row in everything["auditLogs"]] == ["project.created"] * 2
    assert [row["projectId"] for row in mine["auditLogs"]] == [project["id"]]
    assert set(mine["auditLogs"][0]) == {
        "id",
        "projectId",
        "action",
        "details",
        "actor",
        "address",
        "accountId",
        "createdAt",
    }
    assert mine["auditLogs"][0]["accountId"] == "acme"
    assert made["pagination"] == {"total": 2, "limit": 1, "offset": 0, "hasMore": True}


def test_a_row_that_is_sealed_shows_its_place(api: Api, mill: Mill) -> None:
    api.a_project()
    mill.tx(seal_trail, limit=10)

    (row,) = api.get("/api/audit-logs")["auditLogs"]

    assert row["seq"] == 1
    assert row["hash"] == mill.audited()[0].hash.hex()


def test_a_member_sees_the_rows_of_its_tenant_only(
    closed: Any, new_client: Any, clock: SettableClock
) -> None:
    mill = Mill(closed.state.coordinator, clock)
    owner = mill.a_member("acme")
    held = mill.a_running_step()
    mill.a_project("others")
    mill.complete(held)

    page = new_client(closed).get("/api/audit-logs?limit=1000", headers=owner).json()

    assert {row["accountId"] for row in page["auditLogs"]} == {"acme"}
    assert {"step.claimed", "step.finished"} <= {row["action"] for row in page["auditLogs"]}
    assert page["pagination"]["total"] == len(page["auditLogs"])


@ON_SQLITE
@pytest.mark.threat("L09")
@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "offset=-1", "limit=1&limit=1", "who=me"])
def test_a_page_of_the_trail_that_makes_no_sense_is_refused(api: Api, query: str) -> None:
    assert api.client.get(f"/api/audit-logs?{query}").status_code == 400
    assert api.client.get("/api/audit-logs?limit=1000").status_code == 200


# Refused callers


def ask_as_nobody(api: Api) -> None:
    answer = api.client.post(
        "/api/runner/heartbeat", json={}, headers={"Authorization": "Bearer secret-word"}
    )
    assert answer.status_code == 401


def test_a_caller_that_is_not_known_is_written_down_without_its_token(api: Api, mill: Mill) -> None:
    ask_as_nobody(api)

    (row,) = mill.audited()
    assert (row.action, row.actor, row.address) == ("access.denied", "unknown", "127.0.0.1")
    assert row.details == {"method": "POST", "path": "/api/runner/heartbeat", "status": 401}


def test_a_flood_of_refused_calls_writes_one_row_a_second(api: Api, mill: Mill) -> None:
    for _ in range(20):
        ask_as_nobody(api)
    assert actions(mill) == ["access.denied"]

    mill.clock.advance(1)
    ask_as_nobody(api)

    assert [row.details.get("omitted") for row in mill.audited("access.denied")] == [None, 19]


STRANGER = Caller(actor="unknown", audience=Audience.ANYONE, address="192.0.2.1")
ROUTE = ("GET", "/api/runners", 401)


async def flood(denials: Denials, count: int) -> None:
    for number in range(count):
        stranger = replace(STRANGER, address=f"192.0.2.{number}")
        await denials.write_down(stranger, *ROUTE)


async def test_what_was_left_out_of_a_flood_is_counted_when_it_is_over(mill: Mill) -> None:
    denials = Denials(mill.state)
    for _ in range(20):
        await denials.write_down(STRANGER, *ROUTE)
    await denials.write_omitted()
    assert len(mill.audited()) == 1

    mill.clock.advance(1)
    for _ in range(2):
        await denials.write_omitted()

    (_, row) = mill.audited()
    assert (row.action, row.address, row.details) == ("access.denied", "192.0.2.1", {"omitted": 19})


async def test_a_coordinator_that_stops_writes_down_what_it_has_counted(mill: Mill) -> None:
    denials = Denials(mill.state)
    for _ in range(3):
        await denials.write_down(STRANGER, *ROUTE)

    await denials.write_omitted(everything=True)

    assert [row.details.get("omitted") for row in mill.audited()] == [None, 2]


async def test_a_flood_from_many_addresses_is_bounded_too(mill: Mill) -> None:
    denials = Denials(mill.state)
    await flood(denials, MAX_ADDRESSES + 50)
    assert len(mill.audited()) == MAX_ADDRESSES

    await denials.write_omitted()

    row = mill.audited()[-1]
    assert (row.address, row.details) == ("", {"omitted": 50})


async def test_strangers_take_no_room_from_those_who_are_known(mill: Mill) -> None:
    denials = Denials(mill.state)
    await flood(denials, MAX_ADDRESSES + 50)

    for tenant_id in ("t", "u"):
        known = Caller(actor="user:1", audience=Audience.USER, address="192.0.2.1", tenant_id=tenant_id)
        await denials.write_down(known, *ROUTE)

    assert [(row.actor, row.tenant_id) for row in mill.audited()[-2:]] == [("user:1", "t"), ("user:1", "u")]


async def test_a_denial_that_could_not_be_written_down_is_counted(mill: Mill) -> None:
    denials = Denials(mill.state)
    await denials.write_down(STRANGER, *ROUTE)
    mill.state.lanes._closed = True
    mill.clock.advance(1)
    for _ in range(3):
        await denials.write_down(STRANGER, *ROUTE)
    mill.state.lanes._closed = False

    mill.clock.advance(1)
    await denials.write_down(STRANGER, *ROUTE)

    assert [row.details.get("omitted") for row in mill.audited()] == [None, 3]


# Whom it was, and of which tenant


@pytest.fixture
def closed(new_app: Any, settings: Settings) -> Any:
    """A coordinator that wants tokens."""
    return new_app(settings.model_copy(update={"auth": "token"}))


def test_a_member_who_may_not_is_named_with_the_tenant(
    closed: Any, new_client: Any, clock: SettableClock
) -> None:
    mill = Mill(closed.state.coordinator, clock)
    viewer, tenant = mill.a_member("acme", "viewer"), mill.a_tenant("acme")

    answer = new_client(closed).post(
        "/api/docker-images", json={"slug": "a", "imageUrl": "b"}, headers=viewer
    )

    assert answer.status_code == 403
    row = mill.audited("access.denied")[-1]
    assert row.actor.startswith("user:")
    assert (row.tenant_id, row.address, row.details["status"]) == (tenant, "127.0.0.1", 403)


def test_who_names_a_foreign_tenant_is_written_down_in_its_own(
    closed: Any, new_client: Any, clock: SettableClock
) -> None:
    mill = Mill(closed.state.coordinator, clock)
    owner, mine = mill.a_member("acme"), mill.a_tenant("acme")
    owner["X-Tenant-ID"] = mill.a_tenant("others")

    answer = new_client(closed).get("/api/audit-logs", headers=owner)

    assert answer.status_code == 403
    row = mill.audited("access.denied")[-1]
    assert (row.actor.partition(":")[0], row.tenant_id) == ("user", mine)


async def test_who_asks_for_what_belongs_to_others_is_written_down_and_answered_as_if_it_were_not_there(
    closed: Any, new_client: Any, clock: SettableClock
) -> None:
    mill = Mill(closed.state.coordinator, clock)
    owner, mine, foreign = mill.a_member("acme"), mill.a_tenant("acme"), mill.a_project("others")
    build = mill.a_build(project_id=foreign)
    client = new_client(closed)
    paths = {
        "/api/projects/{id}": foreign,
        "/api/builds/{id}": build.id,
        "/api/steps/{id}/log": next(iter(build.steps.values())),
    }

    for template, its_id in paths.items():
        there = client.get(template.replace("{id}", its_id), headers=owner)
        nowhere = client.get(template.replace("{id}", new_id()), headers=owner)
        await closed.state.denials.write_omitted()
        clock.advance(1)

        assert there.status_code == 404, there.text
        assert (there.status_code, there.content) == (nowhere.status_code, nowhere.content)

    rows = mill.audited("access.denied")
    assert {(row.tenant_id, row.project_id) for row in rows} == {(mine, None)}
    assert [row.details for row in rows] == [
        {"method": "GET", "path": template, "status": 404} for template in paths
    ]


async def test_who_names_what_belongs_to_others_in_a_body_is_written_down_as_well(
    closed: Any, new_client: Any, clock: SettableClock
) -> None:
    mill = Mill(closed.state.coordinator, clock)
    owner, mine, foreign = mill.a_member("acme"), mill.a_tenant("acme"), mill.a_project("others")
    build = mill.a_build(project_id=foreign)
    client = new_client(closed)
    asked = {
        "/api/v1/builds": {"project_id": foreign.upper(), "git_branch": "main"},
        "/api/v1/auth/ws-tickets": {"build_id": build.id},
    }

    for path, body in asked.items():
        assert client.post(path, json=body, headers=owner).status_code == 404
        assert client.post(path, json=_with_other_ids(body), headers=owner).status_code == 404
        await closed.state.denials.write_omitted()
        clock.advance(1)

    rows = mill.audited("access.denied")
    assert {(row.tenant_id, row.project_id) for row in rows} == {(mine, None)}
    assert [row.details for row in rows] == [
        {"method": "POST", "path": path, "status": 404} for path in asked
    ]


def _with_other_ids(body: dict[str, str]) -> dict[str, str]:
    return {name: new_id() if name.endswith("_id") else said for name, said in body.items()}


async def test_what_is_not_there_or_ones_own_is_no_denial(
    closed: Any, new_client: Any, clock: SettableClock
) -> None:
    mill = Mill(closed.state.coordinator, clock)
    owner, project = mill.a_member("acme"), mill.a_project("acme")
    client = new_client(closed)

    for path in (f"/api/projects/{new_id()}", "/api/projects/x", f"/api/projects/{project}/workflows/x"):
        assert client.get(path, headers=owner).status_code == 404
    await closed.state.denials.write_omitted()

    assert mill.audited("access.denied") == []


async def test_of_too_many_that_ask_for_what_is_not_there_all_count(mill: Mill) -> None:
    denials = Denials(mill.state)
    known = Caller(
        actor="user:1", audience=Audience.USER, address="192.0.2.1", tenant_id="t", grants={"t": frozenset()}
    )
    for _ in range(MAX_SUSPECTS + 5):
        denials.suspect(known, "GET", "/api/projects/{id}", {new_id()})

    mill.clock.advance(1)
    await denials.write_omitted()

    (row,) = mill.audited("access.denied")
    assert (row.actor, row.details) == ("user:1", {"omitted": 5})


async def test_a_page_of_somebody_else_is_written_down(api: Api, app: Any, mill: Mill) -> None:
    answer = api.client.get("/api/runners", headers={"Origin": "https://evil.example"})
    assert answer.status_code == 403

    await app.state.denials.write_omitted()

    (row,) = mill.audited("access.denied")
    assert (row.actor, row.address, row.details) == ("unknown", "127.0.0.1", {"status": 403})
