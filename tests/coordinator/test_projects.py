"""Projects, images, workflows: made, shown, changed and gone."""

from typing import Any

import pytest

from tests.factories import ON_SQLITE, Api, Mill, a_spec, a_step, together


def paths_of(answer: Any) -> list[str]:
    assert answer.status_code == 400, answer.text
    return [detail["path"] for detail in answer.json()["details"]]


# Projects


def test_a_project_is_shown_as_it_was_made(api: Api) -> None:
    made = api.a_project()

    assert set(made) == {"id", "accountId", "name", "createdAt", "updatedAt"}
    assert (made["accountId"], made["name"]) == ("acme", "a project")
    assert made["createdAt"] == "2026-03-01T08:00:00.000Z"
    assert api.get(f"/api/projects/{made['id']}") == made
    assert api.get("/api/projects?accountId=acme") == [made]


def test_projects_are_listed_by_account_oldest_first(api: Api) -> None:
    first, other, second = api.a_project(), api.a_project("other"), api.a_project()

    assert [one["id"] for one in api.get("/api/projects?accountId=acme")] == [first["id"], second["id"]]
    assert [one["id"] for one in api.get("/api/projects?accountId=other")] == [other["id"]]
    assert api.get("/api/projects?accountId=unknown") == []


def test_accounts_that_are_named_together_for_the_first_time_are_one(api: Api) -> None:
    together(*[lambda: api.a_project("new")] * 6)

    assert len(api.get("/api/projects?accountId=new")) == 6


@ON_SQLITE
def test_a_list_needs_its_account(api: Api) -> None:
    for query in (
        "",
        "?accountId=",
        "?accountId=a&accountId=b",
        "?accountId=a&x=1",
        "?accountId=" + "a" * 256,
    ):
        assert api.client.get("/api/projects" + query).status_code == 400


@ON_SQLITE
@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"accountId": "a"}, "name"),
        ({"name": "n"}, "accountId"),
        ({"accountId": "a", "name": ""}, "name"),
        ({"accountId": "a", "name": "n" * 101}, "name"),
        ({"accountId": "a", "name": 3}, "name"),
        ({"accountId": "a", "name": None}, "name"),
        ({"accountId": "a", "name": "a\u202eb"}, "name"),
        ({"accountId": "a\nb", "name": "n"}, "accountId"),
        ({"accountId": "a", "name": "n", "id": "x"}, "id"),
    ],
)
def test_a_project_that_is_none_is_refused_and_the_place_named(api: Api, body: Any, path: str) -> None:
    assert paths_of(api.client.post("/api/projects", json=body)) == [path]


def test_the_settings_of_a_project_can_be_changed_and_cleared(api: Api, mill: Mill) -> None:
    workflow = api.a_workflow()
    path = f"/api/projects/{workflow['projectId']}"
    mill.clock.advance(60)
    changes = {
        "name": "another name",
        "repoUrl": "https://example.org/r.git",
        "defaultBranch": "main",
        "defaultWorkflowId": workflow["id"],
    }

    changed = api.client.patch(path, json=changes).json()

    assert {name: changed[name] for name in changes} == changes
    assert changed["updatedAt"] > changed["createdAt"]
    assert api.get(path) == changed
    cleared = api.client.patch(path, json={"repoUrl": None, "defaultWorkflowId": None}).json()
    assert "repoUrl" not in cleared and "defaultWorkflowId" not in cleared
    assert cleared["defaultBranch"] == "main"
    assert api.client.patch(path, json={}).status_code == 200


@ON_SQLITE
def test_every_fault_of_a_change_is_named_and_nothing_is_changed(api: Api) -> None:
    project = api.a_project()
    other = api.a_workflow()

    answer = api.client.patch(
        f"/api/projects/{project['id']}",
        json={
            "name": None,
            "repoUrl": "git@host:o/r",
            "defaultBranch": "-x",
            "defaultWorkflowId": other["id"],
        },
    )

    assert sorted(paths_of(answer)) == ["defaultBranch", "defaultWorkflowId", "name", "repoUrl"]
    assert api.get(f"/api/projects/{project['id']}") == project


def test_a_deleted_project_is_as_if_it_had_never_been(api: Api) -> None:
    workflow = api.a_workflow()
    path = f"/api/projects/{workflow['projectId']}"

    assert api.client.delete(path).status_code == 204

    assert api.get("/api/projects?accountId=acme") == []
    for method, where in (
        ("GET", path),
        ("PATCH", path),
        ("DELETE", path),
        ("GET", path + "/workflows"),
        ("GET", path + f"/workflows/{workflow['id']}"),
        ("GET", path + "/builds"),
    ):
        body = {"json": {}} if method == "PATCH" else {}
        assert api.client.request(method, where, **body).status_code == 404, (method, where)
    answer = api.client.post(path + "/builds", json={"workflowId": workflow["id"]})
    assert answer.status_code == 404


def test_a_project_with_a_build_that_has_not_ended_stays(api: Api) -> None:
    build = api.a_build()
    path = f"/api/projects/{build['projectId']}"

    assert api.client.delete(path).status_code == 409

    api.client.post(f"/api/builds/{build['id']}/cancel")
    assert api.client.delete(path).status_code == 204
    assert api.client.get(f"/api/builds/{build['id']}").status_code == 404


# Docker images


def test_an_image_is_shown_as_it_was_made(api: Api) -> None:
    made = api.post(
        "/api/docker-images", {"slug": "box", "imageUrl": "docker://ghcr.io/o/i:1", "public": True}
    )

    assert set(made) == {"id", "slug", "imageUrl", "public", "createdAt"}
    assert made["imageUrl"] == "docker://ghcr.io/o/i:1"
    assert api.get("/api/docker-images") == [made]
    assert api.get("/api/docker-images?public=true") == [made]
    assert api.get("/api/docker-images?public=false") == []
    assert api.client.get("/api/docker-images?public=yes").status_code == 400


def test_a_slug_is_taken_once(api: Api) -> None:
    body = {"slug": "box", "imageUrl": "busybox:1"}

    answers = together(*[lambda: api.client.post("/api/docker-images", json=body).status_code] * 5)

    assert sorted(answers) == [201, 409, 409, 409, 409]  # type: ignore[type-var]


@ON_SQLITE
def test_an_image_that_is_none_is_refused_with_every_fault(api: Api) -> None:
    answer = api.client.post("/api/docker-images", json={"slug": "Not A Slug", "imageUrl": "://"})

    assert paths_of(answer) == ["slug", "imageUrl"]


def test_an_image_goes_once_no_workflow_uses_it(api: Api) -> None:
    workflow = api.a_workflow()
    image = api.an_image()
    path = f"/api/projects/{workflow['projectId']}/workflows/{workflow['id']}"

    assert api.client.delete(f"/api/docker-images/{image['id']}").status_code == 409

    api.an_image("other")
    other = {"name": "w", "steps": [a_step("test", imageSlug="other")]}
    assert api.client.put(path, json=other).status_code == 200
    assert api.client.delete(f"/api/docker-images/{image['id']}").status_code == 204
    assert [one["slug"] for one in api.get("/api/docker-images")] == ["other"]
    assert api.client.delete(path).status_code == 204
    assert api.client.delete(f"/api/docker-images/{api.an_image('other')['id']}").status_code == 204
    assert api.client.delete("/api/docker-images/nope").status_code == 404


# Workflows


def test_a_workflow_is_shown_as_it_was_made(api: Api) -> None:
    steps = [a_step("build", outputPaths=["out/"]), a_step("test", ["build"], labels=["b", "a", "b"])]
    made = api.a_workflow(steps)
    path = f"/api/projects/{made['projectId']}/workflows"

    shown = api.get(f"{path}/{made['id']}")

    assert set(made) == {"id", "projectId", "name", "createdAt", "updatedAt"}
    assert api.get(path) == [made]
    assert shown["version"] == 1
    assert [step["name"] for step in shown["steps"]] == ["build", "test"]
    assert shown["steps"][0]["outputPaths"] == ["out"]
    assert shown["steps"][1]["labels"] == ["a", "b"]
    assert shown["steps"][1]["timeoutSeconds"] == 3600


def test_what_is_shown_can_be_put_back(api: Api) -> None:
    made = api.a_workflow(a_spec(one=[], two=["one"]))
    path = f"/api/projects/{made['projectId']}/workflows/{made['id']}"
    shown = api.get(path)

    answer = api.client.put(path, json={"name": shown["name"], "steps": shown["steps"]})

    assert answer.status_code == 200
    assert api.get(path)["steps"] == shown["steps"]
    assert api.get(path)["version"] == 2


def test_a_workflow_is_found_in_its_own_project_only(api: Api) -> None:
    made = api.a_workflow()
    elsewhere = f"/api/projects/{api.a_project()['id']}/workflows/{made['id']}"

    assert api.client.get(elsewhere).status_code == 404
    assert api.client.put(elsewhere, json={"name": "w", "steps": a_spec()}).status_code == 404
    assert api.client.delete(elsewhere).status_code == 404


def test_every_fault_of_a_workflow_is_named_at_once(api: Api) -> None:
    made = api.a_workflow()
    broken = {
        "name": "",
        "steps": [a_step("a", ["b"]), a_step("b", ["a", "zz"]), a_step("a", imageSlug="nope"), {"name": 3}],
    }

    for answer in (
        api.client.post(f"/api/projects/{made['projectId']}/workflows", json=broken),
        api.client.put(f"/api/projects/{made['projectId']}/workflows/{made['id']}", json=broken),
    ):
        found = paths_of(answer)
        for path in (
            "name",
            "steps[0].dependsOn",
            "steps[1].dependsOn[1]",
            "steps[2].name",
            "steps[2].imageSlug",
            "steps[3].name",
            "steps[3].runScript",
        ):
            assert path in found
    assert len(api.get(f"/api/projects/{made['projectId']}/workflows")) == 1


def test_a_deleted_workflow_is_gone_and_its_builds_go_on(api: Api) -> None:
    build = api.a_build()
    path = f"/api/projects/{build['projectId']}"
    api.client.patch(path, json={"defaultWorkflowId": build["workflowId"]})

    assert api.client.delete(f"{path}/workflows/{build['workflowId']}").status_code == 204

    assert api.get(f"{path}/workflows") == []
    assert "defaultWorkflowId" not in api.get(path)
    answer = api.client.post(f"{path}/builds", json={"workflowId": build["workflowId"]})
    assert answer.status_code == 404
    assert len(api.acquire(api.a_runner())) == 1


@ON_SQLITE
def test_a_body_is_an_object(api: Api) -> None:
    path = f"/api/projects/{api.a_project()['id']}/workflows"

    for body in ([], "text", 3, None, {"name": "w", "steps": a_spec(), "more": 1}):
        answer = api.client.post(path, json=body)
        assert answer.status_code in (400, 415), body
    assert api.client.post(path, json={"name": "w", "steps": {}}).status_code == 400
    assert api.client.post(path, json={"name": "w", "steps": []}).status_code == 400


def test_an_id_may_be_written_in_capitals_wherever_it_stands(api: Api) -> None:
    workflow = api.a_workflow([a_step("test")])
    project_id, workflow_id = workflow["projectId"], workflow["id"]
    there = f"/api/projects/{project_id.upper()}"

    build = api.post(f"{there}/builds", {"workflowId": workflow_id.upper()})
    changed = api.client.patch(there, json={"defaultWorkflowId": workflow_id.upper()})
    trail = api.get(f"/api/audit-logs?projectId={project_id.upper()}")

    assert (build["projectId"], build["workflowId"]) == (project_id, workflow_id)
    assert (changed.status_code, changed.json()["defaultWorkflowId"]) == (200, workflow_id)
    assert api.get(f"{there}/workflows/{workflow_id.upper()}")["id"] == workflow_id
    assert api.get(f"/api/builds/{build['id'].upper()}")["id"] == build["id"]
    assert trail["pagination"]["total"] > 0
