"""Every change a user can see leaves a row, and looking leaves none."""

import pytest

from coordinator.actions.cancel_build import cancel_build
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
