"""What a project's builds take can be read and set on both surfaces."""

from typing import Any

import httpx
import pytest

from tests.factories import Mill, a_spec


@pytest.fixture
def member(mill: Mill) -> dict[str, str]:
    return mill.a_member("acme", "admin")


def test_what_one_surface_sets_the_other_shows(
    client: httpx.Client, mill: Mill, member: dict[str, str]
) -> None:
    project = mill.a_project("acme")
    workflow = mill.a_workflow(project, a_spec())
    changes = {
        "repo_url": "https://git.example/o/r",
        "default_branch": "main",
        "default_workflow_id": workflow,
    }

    said = client.patch(f"/api/v1/projects/{project}", headers=member, json=changes)

    assert said.status_code == 200
    shown: dict[str, Any] = client.get(f"/api/projects/{project}").json()
    assert (shown["repoUrl"], shown["defaultBranch"]) == ("https://git.example/o/r", "main")
    assert shown["defaultWorkflowId"] == workflow
    client.patch(f"/api/projects/{project}", json={"defaultBranch": "next"})
    again = client.get(f"/api/v1/projects/{project}", headers=member).json()
    assert again == {**said.json(), "default_branch": "next", "updated_at": again["updated_at"]}


def test_every_fault_is_named_in_the_words_of_this_surface(
    client: httpx.Client, mill: Mill, member: dict[str, str]
) -> None:
    project = mill.a_project("acme")
    wrong = {"repo_url": "ftp://x", "default_branch": "..", "default_workflow_id": "nothing"}

    answer = client.patch(f"/api/v1/projects/{project}", headers=member, json=wrong)

    assert answer.status_code == 400
    assert set(answer.json()["details"]) == set(wrong)
    assert "repo_url" not in client.get(f"/api/v1/projects/{project}", headers=member).json()


def test_projects_come_in_pages_and_are_the_tenants_own(
    client: httpx.Client, mill: Mill, member: dict[str, str]
) -> None:
    mine = [mill.a_project("acme") for _ in range(3)]
    mill.a_project("other")

    first = client.get("/api/v1/projects?limit=2", headers=member).json()
    second = client.get("/api/v1/projects?limit=2&page=2", headers=member).json()

    assert [one["id"] for one in first["projects"] + second["projects"]] == mine
    assert (first["total_count"], first["has_more"], second["has_more"]) == (3, True, False)
    assert client.get("/api/v1/projects?limit=0", headers=member).status_code == 400


def test_a_viewer_changes_nothing(client: httpx.Client, mill: Mill) -> None:
    project = mill.a_project("acme")
    viewer = mill.a_member("acme", "viewer")

    answer = client.patch(f"/api/v1/projects/{project}", headers=viewer, json={"default_branch": "main"})

    assert answer.status_code == 403
