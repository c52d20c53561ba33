"""A client that knows nothing but the contract's own file gets a build done."""

import inspect
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from jsonschema import ValidationError

from tests.contract.published import OPERATIONS, Operation


class GeneratedClient:
    """One function for each operation, such as post_projects_id_builds(id, body=...).

    Requests and answers are held against the contract's schemas, which here are all that is known.
    """

    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        for operation in OPERATIONS.values():
            setattr(self, operation.function_name, self._function(operation))

    def _function(self, operation: Operation) -> Callable[..., Any]:
        def call(*places: str, body: Any = None, **query: Any) -> Any:
            operation.check_request(query, body)
            names = list(operation.parameters("path"))
            path = operation.path.format(**dict(zip(names, places, strict=True)))
            answer = self._http.request(operation.method, path, params=query, json=body)
            operation.check_answer(answer)
            answer.raise_for_status()
            return answer.json() if "json" in answer.headers["content-type"] else answer.text

        call.__name__ = operation.function_name
        call.__doc__ = operation.spec["summary"]
        return call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"the contract has no operation called {name}")


@pytest.fixture
def generated(client: httpx.Client) -> GeneratedClient:
    return GeneratedClient(client)


def test_every_operation_of_the_contract_can_be_called_from_its_file_alone(
    generated: GeneratedClient,
) -> None:
    functions = {name for name, found in vars(generated).items() if inspect.isfunction(found)}

    assert functions == {
        "get_projects",
        "post_projects",
        "get_projects_id_workflows",
        "post_projects_id_workflows",
        "get_projects_id_builds",
        "post_projects_id_builds",
        "get_docker_images",
        "post_docker_images",
        "get_runner_stepid",
        "post_runner_stepid_complete",
        "get_audit_logs",
    }


def test_a_generated_client_takes_a_build_from_a_project_to_success(
    generated: GeneratedClient, client: httpx.Client, tmp_path: Path
) -> None:
    generated.post_docker_images(body={"slug": "box", "imageUrl": "docker://busybox:1", "public": True})
    project = generated.post_projects(body={"accountId": "acme", "name": "a project"})
    step = {"imageSlug": "box", "cacheDirs": [], "outputPaths": []}
    first = {**step, "name": "compile", "dependsOn": [], "runScript": "printf compiled > made.txt"}
    second = {
        **step,
        "name": "test",
        "dependsOn": ["compile"],
        "runScript": "test $(cat made.txt) = compiled",
    }
    workflow = generated.post_projects_id_workflows(
        project["id"], body={"name": "w", "steps": [first, second]}
    )

    build = generated.post_projects_id_builds(project["id"], body={"workflowId": workflow["id"]})
    # the contract has no way from a build to the ids of its steps, so these come from our own route
    steps = {one["name"]: one["id"] for one in client.get(f"/api/builds/{build['id']}").json()["steps"]}
    said = []
    for name in ("compile", "test"):
        script = generated.get_runner_stepid(steps[name])
        ran = subprocess.run(["bash"], input=script, cwd=tmp_path, capture_output=True, text=True, timeout=30)
        body = {"status": "failed" if ran.returncode else "success", "logs": ran.stdout + ran.stderr}
        said.append(generated.post_runner_stepid_complete(steps[name], body=body))

    assert said == [
        {"success": True, "stepStatus": "SUCCESS", "buildComplete": False},
        {"success": True, "stepStatus": "SUCCESS", "buildComplete": True},
    ]
    listed = generated.get_projects_id_builds(project["id"], limit=1, offset=0)
    assert [(one["id"], one["status"]) for one in listed["builds"]] == [(build["id"], "SUCCESS")]
    assert generated.get_projects(accountId="acme") == [project]
    assert [one["id"] for one in generated.get_projects_id_workflows(project["id"])] == [workflow["id"]]
    actions = {entry["action"] for entry in generated.get_audit_logs(projectId=project["id"])["auditLogs"]}
    assert {"project.created", "workflow.created", "build.created"} <= actions


def test_a_generated_client_does_not_let_through_what_the_contract_forbids(
    generated: GeneratedClient,
) -> None:
    with pytest.raises(ValidationError):
        generated.post_projects(body={"accountId": "acme", "name": "x" * 101})
