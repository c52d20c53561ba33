"""The projects of a tenant: which repository, branch and workflow their builds take."""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import Response

from coordinator.actions.change_project import change_project as change_project_action
from coordinator.actions.list_own_projects import list_own_projects
from coordinator.actions.show_project import show_project as show_project_action
from coordinator.api.endpoint import Answer, AnyCaseId, Call, Endpoint, Query, QueryInt, json_answer
from coordinator.api.executions.build_shapes import Moment
from coordinator.api.executions.operations import operation
from coordinator.api.executions.shapes import Input, Shape
from coordinator.errors import Invalid
from coordinator.rules.access import Audience, Policy, Scope
from coordinator.tables import Project

TAG = "Build Execution"
_OURS = {
    "repoUrl": "repo_url",
    "defaultBranch": "default_branch",
    "defaultWorkflowId": "default_workflow_id",
}


class ExecutionProject(Shape):
    """A project."""

    id: str
    name: str
    repo_url: str | None = None
    default_branch: str | None = None
    default_workflow_id: str | None = None
    created_at: Moment
    updated_at: Moment


class ExecutionProjects(Shape):
    """One page of them."""

    projects: list[ExecutionProject]
    total_count: int
    page: int
    limit: int
    has_more: bool


class ExecutionProjectQuery(Query):
    """Which page."""

    page: Annotated[QueryInt, Field(ge=1, le=2**31 - 1, description="Page number, from 1")] = 1
    limit: Annotated[QueryInt, Field(ge=1, le=100, description="Items per page")] = 20


class ExecutionProjectPatch(Input):
    """Only what is named is changed; null clears."""

    repo_url: Annotated[str | None, Field(min_length=1, max_length=2048)] = None
    default_branch: Annotated[str | None, Field(min_length=1, max_length=244)] = None
    default_workflow_id: Annotated[AnyCaseId | None, Field(min_length=1, max_length=36)] = None


async def list_projects(call: Call) -> Response:
    page: ExecutionProjectQuery = call.query
    offset = (page.page - 1) * page.limit
    found, total = await call.read(list_own_projects, call.caller, limit=page.limit, offset=offset)
    return json_answer(
        ExecutionProjects(
            projects=[_shown(project) for project in found],
            total_count=total,
            page=page.page,
            limit=page.limit,
            has_more=offset + len(found) < total,
        )
    )


async def show_project(call: Call) -> Response:
    project, _ = await call.read(show_project_action, call.caller, call.path["id"])
    return json_answer(_shown(project))


async def change_project(call: Call) -> Response:
    body: ExecutionProjectPatch = call.body
    changes = {name: getattr(body, name) for name in body.model_fields_set}
    try:
        project, _ = await call.write(
            change_project_action, call.state.site, call.caller, call.path["id"], changes
        )
    except Invalid as error:
        details = tuple(replace(fault, path=_OURS.get(fault.path, fault.path)) for fault in error.details)
        raise Invalid(error.message, details=details) from error
    return json_answer(_shown(project))


def _shown(project: Project) -> ExecutionProject:
    return ExecutionProject.model_validate(project.model_dump(include=set(ExecutionProject.model_fields)))


def _projects(method: str, path: str, handler: Any, summary: str, permission: str, **more: Any) -> Endpoint:
    if "{id}" in path:
        more["parameters"] = {"id": "Project identifier"}
    policy = Policy(Audience.USER, permission, Scope.HEADER)
    return operation(method, f"/projects{path}", handler, summary, tag=TAG, policy=policy, **more)


ENDPOINTS: list[Endpoint] = [
    _projects(
        "GET",
        "",
        list_projects,
        "List the tenant's projects",
        "project:list",
        query=ExecutionProjectQuery,
        ok={200: Answer("One page of them, oldest first", ExecutionProjects)},
    ),
    _projects(
        "GET",
        "/{id}",
        show_project,
        "Get a project",
        "project:read",
        ok={200: Answer("The project", ExecutionProject)},
    ),
    _projects(
        "PATCH",
        "/{id}",
        change_project,
        "Change what a project's builds take",
        "project:change",
        body=ExecutionProjectPatch,
        ok={200: Answer("The project as it is now", ExecutionProject)},
    ),
]
