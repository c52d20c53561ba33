"""Every change a user can see leaves a row, and looking leaves none."""

import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.release_step import release_step
from coordinator.actions.say_bye import say_bye
from coordinator.api.denials import MAX_ADDRESSES, Denials
from coordinator.rules.access import Audience, Caller
from tests.factories import LOCAL, ON_SQLITE, Api, HeldOverHttp, Mill, a_spec


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
    mill.now(cancel_build, LOCAL, mill.step(held.step_id).build_id)
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
    mill.now(say_bye, held.runner.caller)
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
    mill.now(cancel_build, LOCAL, mill.step(held.step_id).build_id)
    mill.now(say_bye, held.runner.caller)

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
        "createdAt",
    }
    assert made["pagination"] == {"total": 2, "limit": 1, "offset": 0, "hasMore": True}


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

    assert actions(mill) == ["access.denied"] * 2


async def test_a_flood_from_many_addresses_is_bounded_too(mill: Mill) -> None:
    denials = Denials(mill.state)
    for number in range(MAX_ADDRESSES + 50):
        caller = Caller(actor="unknown", audience=Audience.ANYONE, address=f"192.0.2.{number}")
        await denials.write_down(caller, "GET", "/api/runners", 401)

    assert len(mill.audited()) == MAX_ADDRESSES
