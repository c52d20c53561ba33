"""Each operation of the published contract, as a client of it sees them: statuses, bodies, defaults."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.contract.published import OPERATIONS, check
from tests.factories import Api, a_spec, a_step

NOWHERE = "00000000-0000-7000-8000-000000000000"
REFUSED = tomllib.loads((Path(__file__).parent / "narrowings.toml").read_text())["refused"]
Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(client: httpx.Client) -> Ask:
    """Calls an operation of the contract and holds its answer against the contract."""

    def call(name: str, *places: str, **more: Any) -> httpx.Response:
        operation = OPERATIONS[name]
        names = list(operation.parameters("path"))
        path = operation.path.format(**dict(zip(names, places, strict=True)))
        answer = client.request(operation.method, path, **more)
        operation.check_answer(answer)
        return answer

    return call


def refusal(answer: httpx.Response, status: int) -> dict[str, Any]:
    body: dict[str, Any] = answer.json()
    assert answer.status_code == status
    assert body.keys() == {"error", "code", "details"}
    assert all(detail.keys() == {"path", "reason"} for detail in body["details"])
    return body


# Projects


def test_a_project_is_made_and_listed_for_its_account(ask: Ask) -> None:
    made = ask("POST /api/projects", json={"accountId": "acme", "name": "one"})
    listed = ask("GET /api/projects", params={"accountId": "acme"})

    assert made.status_code == 201
    assert made.json().keys() == {"id", "accountId", "name", "createdAt", "updatedAt"}
    assert (made.json()["accountId"], made.json()["name"]) == ("acme", "one")
    assert listed.json() == [made.json()]


def test_an_account_without_projects_has_an_empty_list(ask: Ask) -> None:
    assert ask("GET /api/projects", params={"accountId": "nobody"}).json() == []


def test_projects_are_not_listed_without_an_account(ask: Ask) -> None:
    said = refusal(ask("GET /api/projects"), 400)

    assert said["details"] == [{"path": "accountId", "reason": "is required"}]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"name": "one"}, "accountId"),
        ({"accountId": "acme"}, "name"),
        ({"accountId": "", "name": "one"}, "accountId"),
        ({"accountId": "acme", "name": ""}, "name"),
        ({"accountId": "acme", "name": "x" * 101}, "name"),
        ({"accountId": "acme", "name": 1}, "name"),
        ({"accountId": "acme", "name": "one", "nmae": "two"}, "nmae"),
    ],
)
def test_a_project_that_is_not_valid_is_refused_and_the_field_named(ask: Ask, body: Any, path: str) -> None:
    said = refusal(ask("POST /api/projects", json=body), 400)

    assert [detail["path"] for detail in said["details"]] == [path]


# Workflows


def test_a_workflow_is_made_and_listed(ask: Ask, api: Api) -> None:
    project = api.a_project()["id"]
    api.an_image()

    made = ask(
        "POST /api/projects/{id}/workflows", project, json={"name": "w", "steps": a_spec(a=[], b=["a"])}
    )
    listed = ask("GET /api/projects/{id}/workflows", project)

    assert made.status_code == 201
    assert made.json().keys() == {"id", "projectId", "name", "createdAt", "updatedAt"}
    assert made.json()["projectId"] == project
    assert listed.json() == [made.json()]


@pytest.mark.parametrize("name", ["GET /api/projects/{id}/workflows", "GET /api/projects/{id}/builds"])
def test_lists_of_an_unknown_project_are_404(ask: Ask, name: str) -> None:
    refusal(ask(name, NOWHERE), 404)


def test_a_workflow_of_an_unknown_project_is_404(ask: Ask) -> None:
    refusal(ask("POST /api/projects/{id}/workflows", NOWHERE, json={"name": "w", "steps": a_spec()}), 404)


def test_a_workflow_is_refused_with_every_fault_at_once(ask: Ask, api: Api) -> None:
    project = api.a_project()["id"]
    api.an_image()
    steps = [a_step("a", ["b"]), a_step("b", ["nowhere"]), a_step("b", imageSlug="missing"), {"name": "c"}]

    body = {"name": "", "stepz": [], "steps": steps}
    said = refusal(ask("POST /api/projects/{id}/workflows", project, json=body), 400)

    assert {
        "name",
        "stepz",
        "steps[1].dependsOn[0]",
        "steps[2].name",
        "steps[2].imageSlug",
        "steps[3].imageSlug",
        "steps[3].dependsOn",
        "steps[3].runScript",
        "steps[3].cacheDirs",
        "steps[3].outputPaths",
    } == {detail["path"] for detail in said["details"]}


# Builds


def test_a_build_is_made_pending_with_what_was_said_of_it(ask: Ask, api: Api) -> None:
    workflow = api.a_workflow()
    said = {
        "workflowId": workflow["id"],
        "commitHash": "0123456789abcdef0123456789abcdef01234567",
        "repoUrl": "https://git.example/owner/name",
        "branch": "main",
        "commitMessage": "Say what is different",
        "commitAuthor": "A. Author",
    }

    made = ask("POST /api/projects/{id}/builds", workflow["projectId"], json=said)

    assert made.status_code == 201
    assert made.json().items() >= {**said, "projectId": workflow["projectId"], "status": "PENDING"}.items()


def test_what_is_unset_is_left_out_of_a_build(ask: Ask, api: Api) -> None:
    workflow = api.a_workflow()

    made = ask("POST /api/projects/{id}/builds", workflow["projectId"], json={"workflowId": workflow["id"]})

    assert made.json().keys() == {"id", "projectId", "workflowId", "status", "createdAt", "number"}


def test_a_build_needs_a_workflow(ask: Ask, api: Api) -> None:
    said = refusal(ask("POST /api/projects/{id}/builds", api.a_project()["id"], json={}), 400)

    assert said["details"] == [{"path": "workflowId", "reason": "is required"}]


def test_a_build_of_an_unknown_project_or_workflow_is_404(ask: Ask, api: Api) -> None:
    workflow = api.a_workflow()
    another = api.a_project()["id"]

    for project, wanted in [(NOWHERE, workflow["id"]), (another, NOWHERE), (another, workflow["id"])]:
        refusal(ask("POST /api/projects/{id}/builds", project, json={"workflowId": wanted}), 404)


def test_builds_come_twenty_at_a_time_newest_first(ask: Ask, api: Api) -> None:
    workflow = api.a_workflow()
    project, body = workflow["projectId"], {"workflowId": workflow["id"]}
    made = [api.post(f"/api/projects/{project}/builds", body)["id"] for _ in range(21)]

    first = ask("GET /api/projects/{id}/builds", project).json()
    second = ask("GET /api/projects/{id}/builds", project, params={"offset": 20}).json()

    assert [build["id"] for build in first["builds"] + second["builds"]] == made[::-1]
    assert first["pagination"] == {"total": 21, "limit": 20, "offset": 0, "hasMore": True}
    assert second["pagination"] == {"total": 21, "limit": 20, "offset": 20, "hasMore": False}


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=101", "limit=-1", "limit=x", "offset=-1", "limit=1&limit=2"]
)
def test_a_page_out_of_bounds_is_refused_and_not_clamped(client: httpx.Client, api: Api, query: str) -> None:
    refusal(client.get(f"/api/projects/{api.a_project()['id']}/builds?{query}"), 400)


# Images


def test_an_image_is_private_unless_said_otherwise(ask: Ask) -> None:
    private = ask("POST /api/docker-images", json={"slug": "one", "imageUrl": "alpine:3"}).json()
    public = ask(
        "POST /api/docker-images", json={"slug": "two", "imageUrl": "docker://alpine:3", "public": True}
    ).json()

    listed = ask("GET /api/docker-images").json()
    only_public = ask("GET /api/docker-images", params={"public": "true"}).json()

    assert (private["public"], public["public"]) == (False, True)
    assert private.keys() == {"id", "slug", "imageUrl", "public", "createdAt"}
    assert sorted(image["slug"] for image in listed) == ["one", "two"]
    assert only_public == [public]


def test_a_slug_is_taken_once(ask: Ask) -> None:
    body = {"slug": "one", "imageUrl": "alpine"}
    assert ask("POST /api/docker-images", json=body).status_code == 201

    refusal(ask("POST /api/docker-images", json=body), 409)


@pytest.mark.parametrize(
    "body",
    [
        {"slug": "one"},
        {"imageUrl": "alpine"},
        {"slug": "", "imageUrl": "alpine"},
        {"slug": "x" * 51, "imageUrl": "alpine"},
        {"slug": "one", "imageUrl": "No Image"},
        {"slug": "one", "imageUrl": "alpine", "public": "yes"},
    ],
)
def test_an_image_that_is_not_valid_is_refused(ask: Ask, body: Any) -> None:
    refusal(ask("POST /api/docker-images", json=body), 400)


# Steps


def test_the_script_of_a_step_is_plain_text_for_bash(ask: Ask, api: Api) -> None:
    step = api.a_build([a_step("a", runScript="echo 'from the workflow'")])["steps"][0]

    answer = ask("GET /api/runner/{stepId}", step["id"])

    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.startswith("#!")


def test_the_script_of_an_unknown_step_is_404(ask: Ask) -> None:
    refusal(ask("GET /api/runner/{stepId}", NOWHERE), 404)


def test_completions_carry_a_build_to_its_end(ask: Ask, api: Api) -> None:
    build = api.a_build(a_spec(a=[], b=["a"]))
    ids = {step["name"]: step["id"] for step in build["steps"]}

    first = ask("POST /api/runner/{stepId}/complete", ids["a"], json={"status": "success", "logs": "hello\n"})
    second = ask("POST /api/runner/{stepId}/complete", ids["b"], json={"status": "failed"})

    assert first.json() == {"success": True, "stepStatus": "SUCCESS", "buildComplete": False}
    assert second.json() == {"success": True, "stepStatus": "FAILED", "buildComplete": True}
    assert api.build(build["id"])["status"] == "FAILED"


def test_a_completion_said_twice_changes_nothing(ask: Ask, api: Api) -> None:
    step = api.a_build()["steps"][0]["id"]
    ask("POST /api/runner/{stepId}/complete", step, json={"status": "success"})

    same = ask("POST /api/runner/{stepId}/complete", step, json={"status": "success"}).json()
    other = ask("POST /api/runner/{stepId}/complete", step, json={"status": "failed"}).json()

    assert same == {"success": True, "stepStatus": "SUCCESS", "buildComplete": True}
    assert other == {"success": False, "stepStatus": "SUCCESS", "buildComplete": True}


def test_a_completion_out_of_turn_or_of_an_unknown_step_is_refused(ask: Ask, api: Api) -> None:
    waiting = next(step for step in api.a_build(a_spec(a=[], b=["a"]))["steps"] if step["name"] == "b")

    refusal(ask("POST /api/runner/{stepId}/complete", waiting["id"], json={"status": "success"}), 400)
    refusal(ask("POST /api/runner/{stepId}/complete", NOWHERE, json={"status": "success"}), 404)


@pytest.mark.parametrize(
    "body", [{}, {"status": "done"}, {"status": "success", "logs": 1}, ["success"], "success"]
)
def test_a_completion_that_is_not_valid_is_refused(ask: Ask, api: Api, body: Any) -> None:
    step = api.a_build()["steps"][0]["id"]

    refusal(ask("POST /api/runner/{stepId}/complete", step, json=body), 400)


# Audit


def test_the_audit_log_is_filtered_and_comes_a_hundred_at_a_time(ask: Ask, api: Api) -> None:
    project = api.a_project()["id"]
    api.a_project("other")

    everything = ask("GET /api/audit-logs").json()
    mine = ask("GET /api/audit-logs", params={"projectId": project, "action": "project.created"}).json()

    assert everything["pagination"] == {"total": 2, "limit": 100, "offset": 0, "hasMore": False}
    assert [entry["projectId"] for entry in mine["auditLogs"]] == [project]
    assert mine["auditLogs"][0]["action"] == "project.created"


def test_pages_of_the_audit_log_say_whether_there_is_more(ask: Ask, api: Api) -> None:
    for _ in range(3):
        api.a_project()

    page = ask("GET /api/audit-logs", params={"limit": 2, "offset": 0}).json()

    assert len(page["auditLogs"]) == 2
    assert page["pagination"] == {"total": 3, "limit": 2, "offset": 0, "hasMore": True}


# What is narrower than the contract


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case['operation']} {case['names']}")
def test_what_the_table_calls_refused_is_refused_and_named(ask: Ask, api: Api, case: dict[str, Any]) -> None:
    operation = OPERATIONS[case["operation"]]
    workflow = api.a_workflow()
    body = {key: workflow["id"] if value == "{workflow}" else value for key, value in case["body"].items()}
    places = [workflow["projectId"]] if operation.parameters("path") else []
    assert operation.body_schema is not None
    check(operation.body_schema, body)

    said = refusal(ask(case["operation"], *places, json=body), 400)

    assert case["names"] in [detail["path"] for detail in said["details"]]
