"""A build is a copy: numbered without gaps, and unmoved by what changes afterwards."""

from typing import Any

import pytest
from sqlalchemy import delete

from coordinator.tables import DockerImage, WorkflowImage, table_of
from tests.factories import ON_SQLITE, Api, Mill, a_spec, a_step, together


def test_a_build_is_shown_with_its_steps(api: Api) -> None:
    build = api.a_build(
        a_spec(one=[], two=["one"]), commitHash="a" * 40, commitMessage="why", commitAuthor="who"
    )

    assert (build["status"], build["number"], build["round"]) == ("PENDING", 1, 1)
    assert (build["commitMessage"], build["commitAuthor"]) == ("why", "who")
    assert "startedAt" not in build and "statusReason" not in build
    assert [(step["name"], step["status"], step["dependsOn"]) for step in build["steps"]] == [
        ("one", "PENDING", []),
        ("two", "PENDING", ["one"]),
    ]
    assert {step["attempt"] for step in build["steps"]} == {0}


def test_only_steps_that_depend_on_none_are_born_ready(mill: Mill) -> None:
    build = mill.a_build(a_spec(one=[], two=["one"], three=[]))

    assert mill.states(build) == {"one": "ready", "two": "pending", "three": "ready"}


def test_numbers_have_no_gaps_however_many_come_at_once(api: Api) -> None:
    workflow = api.a_workflow()
    path = f"/api/projects/{workflow['projectId']}/builds"

    def create() -> list[int]:
        return [api.post(path, {"workflowId": workflow["id"]})["number"] for _ in range(4)]

    answers = together(*[create] * 5, lambda: api.client.post(path, json={"workflowId": "nope"}).status_code)

    numbers = [number for answer in answers[:5] for number in answer]  # type: ignore[union-attr]
    assert sorted(numbers) == list(range(1, 21))


def test_each_project_counts_for_itself(api: Api) -> None:
    assert [api.a_build()["number"], api.a_build()["number"]] == [1, 1]


def test_later_changes_of_the_workflow_do_not_change_a_build(api: Api) -> None:
    build = api.a_build([a_step("test", runScript="echo old")])
    path = f"/api/projects/{build['projectId']}/workflows/{build['workflowId']}"

    api.client.put(path, json={"name": "w", "steps": [a_step("new", runScript="echo new")]})

    assert api.build(build["id"]) == build
    assert "echo old" in api.client.get(f"/api/runner/{build['steps'][0]['id']}").text
    body = {"workflowId": build["workflowId"]}
    second = api.post(f"/api/projects/{build['projectId']}/builds", body)
    assert [step["name"] for step in api.build(second["id"])["steps"]] == ["new"]


def test_later_changes_of_the_image_do_not_change_a_build(api: Api) -> None:
    build = api.a_build()
    api.client.delete(f"/api/projects/{build['projectId']}/workflows/{build['workflowId']}")
    api.client.delete(f"/api/docker-images/{api.an_image()['id']}")
    api.an_image("box", "busybox:2")

    assert api.build(build["id"])["steps"][0]["image"] == "busybox:1"
    assert api.acquire(api.a_runner())[0]["image"] == "busybox:1"


def test_a_build_of_a_workflow_whose_image_went_is_refused_with_the_reason(api: Api, mill: Mill) -> None:
    workflow = api.a_workflow()

    def lose(tx: Any) -> None:
        tx.connection().execute(delete(table_of(WorkflowImage)))
        tx.connection().execute(delete(table_of(DockerImage)))

    mill.tx(lose)
    answer = api.client.post(
        f"/api/projects/{workflow['projectId']}/builds", json={"workflowId": workflow["id"]}
    )

    assert answer.status_code == 400
    assert answer.json()["details"][0]["path"] == "steps[0].imageSlug"


@pytest.mark.parametrize(
    ("project", "said_of_build", "expected"),
    [
        ({}, {}, {}),
        ({}, {"branch": "main"}, {"branch": "main"}),
        (
            {"repoUrl": "https://h/p.git", "defaultBranch": "main"},
            {},
            {"repoUrl": "https://h/p.git", "branch": "main"},
        ),
        (
            {"repoUrl": "https://h/p.git", "defaultBranch": "main"},
            {"branch": "dev"},
            {"repoUrl": "https://h/p.git", "branch": "dev"},
        ),
        (
            {"repoUrl": "https://h/p.git", "defaultBranch": "main"},
            {"commitHash": "abc1234"},
            {"repoUrl": "https://h/p.git", "commitHash": "abc1234"},
        ),
        (
            {"repoUrl": "https://h/p.git", "defaultBranch": "main"},
            {"repoUrl": "https://h/fork.git"},
            {"repoUrl": "https://h/fork.git"},
        ),
    ],
)
def test_a_build_takes_from_its_project_what_it_does_not_say(
    api: Api, project: dict[str, str], said_of_build: dict[str, str], expected: dict[str, str]
) -> None:
    workflow = api.a_workflow()
    path = f"/api/projects/{workflow['projectId']}"
    if project:
        assert api.client.patch(path, json=project).status_code == 200

    made = api.post(f"{path}/builds", {"workflowId": workflow["id"], **said_of_build})

    said = {name: made[name] for name in ("repoUrl", "branch", "commitHash") if name in made}
    assert said == expected


@ON_SQLITE
def test_every_fault_of_a_build_is_named_at_once(api: Api) -> None:
    workflow = api.a_workflow()
    body = {"workflowId": workflow["id"], "repoUrl": "git@h:o/r", "branch": "-x", "commitHash": "HEAD"}

    answer = api.client.post(f"/api/projects/{workflow['projectId']}/builds", json=body)

    assert answer.status_code == 400
    details = {detail["path"]: detail["reason"] for detail in answer.json()["details"]}
    assert set(details) == {"repoUrl", "branch", "commitHash"}
    assert "ssh://" in details["repoUrl"]


def test_a_build_names_a_workflow_of_its_project(api: Api) -> None:
    elsewhere = api.a_workflow()
    path = f"/api/projects/{api.a_project()['id']}/builds"

    assert api.client.post(path, json={"workflowId": elsewhere["id"]}).status_code == 404
    assert api.client.post(path, json={}).status_code == 400


# The list


def test_builds_are_listed_newest_first_in_pages(api: Api) -> None:
    workflow = api.a_workflow()
    path = f"/api/projects/{workflow['projectId']}/builds"
    for _ in range(5):
        api.post(path, {"workflowId": workflow["id"]})

    first = api.get(f"{path}?limit=2")
    last = api.get(f"{path}?limit=2&offset=4")
    beyond = api.get(f"{path}?offset=99")

    assert [build["number"] for build in first["builds"]] == [5, 4]
    assert first["pagination"] == {"total": 5, "limit": 2, "offset": 0, "hasMore": True}
    assert [build["number"] for build in last["builds"]] == [1]
    assert last["pagination"]["hasMore"] is False
    assert beyond["builds"] == []
    assert beyond["pagination"] == {"total": 5, "limit": 20, "offset": 99, "hasMore": False}


@ON_SQLITE
@pytest.mark.threat("L08")
@pytest.mark.threat("L09")
@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=-1",
        "limit=101",
        "limit=1000000000",
        "limit=1;drop",
        "limit=1&limit=2",
        "limit[]=1",
        "limit=",
        "limit=1.0",
        "limit=%31%00",
        "offset=-1",
        f"offset={2**63}",
        f"offset={10**30}",
        "page=2",
    ],
)
def test_a_page_that_makes_no_sense_is_refused(api: Api, query: str) -> None:
    answer = api.client.get(f"/api/projects/{api.a_project()['id']}/builds?{query}")

    assert answer.status_code == 400
    assert answer.json()["details"]


def test_the_greatest_number_that_is_taken_breaks_nothing(api: Api) -> None:
    path = f"/api/projects/{api.a_project()['id']}/builds"

    assert api.get(f"{path}?limit=100&offset={2**53}")["builds"] == []


@ON_SQLITE
@pytest.mark.threat("L08")
def test_an_id_of_any_shape_that_is_not_there_is_404(api: Api) -> None:
    for odd in (str(2**31), str(2**63), "-1", "x" * 500, "%F0%9F%90%88", "'", "null"):
        for path in (
            f"/api/builds/{odd}",
            f"/api/projects/{odd}",
            f"/api/artifacts/{odd}",
            f"/api/steps/{odd}/log",
        ):
            assert api.client.get(path).status_code == 404, path
