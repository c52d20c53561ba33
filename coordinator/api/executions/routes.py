"""The builds of the Build Execution API, each operation in a few lines."""

from typing import Any

from starlette.responses import Response

from coordinator.actions.cancel_build import cancel_unfinished_build
from coordinator.actions.create_unstarted_build import create_unstarted_build
from coordinator.actions.delete_build import delete_build as delete_build_action
from coordinator.actions.find_builds import find_builds
from coordinator.actions.repeat_build import repeat_build
from coordinator.actions.show_build import get_visible_build
from coordinator.actions.show_progress import show_progress
from coordinator.actions.start_build import start_build as start_build_action
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.api.executions import build_shapes as shapes
from coordinator.api.executions.operations import error, operation
from coordinator.api.executions.shapes import Nothing
from coordinator.api.idempotency import make_once
from coordinator.bell import READY, STOPS
from coordinator.rules.access import Audience, Policy, Scope
from coordinator.tables import Build

TAG = "Build Execution"


async def create_build(call: Call) -> Response:
    body: shapes.ExecutionCreate = call.body
    return await make_once(
        call,
        create_unstarted_build,
        call.state.site,
        call.caller,
        body.project_id,
        branch=body.git_branch,
        commit=body.git_commit,
        answer=_made,
    )


async def list_builds(call: Call) -> Response:
    query: shapes.ExecutionQuery = call.query
    found, total = await call.read(find_builds, call.caller, query.search())
    return json_answer(shapes.execution_page(found, total, query))


async def show_build(call: Call) -> Response:
    return json_answer(shapes.execution(await call.read(get_visible_build, call.caller, call.path["id"])))


async def delete_build(call: Call) -> Response:
    await call.write(delete_build_action, call.caller, call.path["id"])
    return Response(status_code=204)


async def start_build(call: Call) -> Response:
    build = await call.write(start_build_action, call.caller, call.path["id"])
    call.state.bell.ring(READY)
    return json_answer(shapes.execution(build))


async def cancel_build(call: Call) -> Response:
    build = await call.write(cancel_unfinished_build, call.state.site, call.caller, call.path["id"])
    call.state.bell.ring(STOPS)
    return json_answer(shapes.execution(build))


async def retry_build(call: Call) -> Response:
    return await make_once(call, repeat_build, call.state.site, call.caller, call.path["id"], answer=_made)


async def show_status(call: Call) -> Response:
    progress = await call.read(show_progress, call.caller, call.path["id"], now=call.state.clock())
    return shapes.status_answer(progress)


def _made(build: Build) -> Response:
    return json_answer(shapes.execution(build), 201)


def _builds(method: str, path: str, handler: Any, summary: str, permission: str, **more: Any) -> Endpoint:
    policy = Policy(Audience.USER, permission, Scope.HEADER)
    return operation(
        method, f"/builds{path}", handler, summary, tag=TAG, policy=policy, is_contract=True, **more
    )


_MOVE: dict[str, Any] = {"body": Nothing, "body_is_optional": True}
_BUILD = Answer("The build as it is now", shapes.Execution)

ENDPOINTS: list[Endpoint] = [
    _builds(
        "POST",
        "",
        create_build,
        "Create a new build",
        "build:create",
        description="Runs the project's workflow on its repository, once it is started.",
        body=shapes.ExecutionCreate,
        ok={201: Answer("The build, queued until it is started", shapes.Execution)},
        errors={
            404: error("No such project"),
            409: error("The Idempotency-Key came with another request before"),
        },
        is_idempotent=True,
    ),
    _builds(
        "GET",
        "",
        list_builds,
        "List all builds",
        "build:list",
        description="The builds of all projects of the tenant.",
        query=shapes.ExecutionQuery,
        ok={200: Answer("One page of them", shapes.ExecutionPage)},
    ),
    _builds(
        "GET",
        "/{id}",
        show_build,
        "Get build details",
        "build:read",
        ok={200: Answer("The build", shapes.Execution)},
    ),
    _builds(
        "DELETE",
        "/{id}",
        delete_build,
        "Delete a build",
        "build:delete",
        description="With its logs and artifacts. Its number is not given again.",
        ok={204: Answer("Done")},
        errors={409: error("It was started and has not ended")},
    ),
    _builds(
        "POST",
        "/{id}/start",
        start_build,
        "Start a build",
        "build:create",
        **_MOVE,
        ok={200: _BUILD},
        errors={409: error("It was started before, or has ended")},
    ),
    _builds(
        "POST",
        "/{id}/cancel",
        cancel_build,
        "Cancel a build",
        "build:cancel",
        description="In progress until the last runner has stopped; at once where none has a step.",
        **_MOVE,
        ok={200: _BUILD},
        errors={409: error("It has ended")},
    ),
    _builds(
        "POST",
        "/{id}/retry",
        retry_build,
        "Retry a failed build",
        "build:create",
        description="Makes a new build of the same source; it has to be started.",
        **_MOVE,
        ok={201: Answer("The new build", shapes.Execution)},
        errors={409: error("It has neither failed nor been cancelled, or its workflow was deleted")},
        is_idempotent=True,
    ),
    _builds(
        "GET",
        "/{id}/status",
        show_status,
        "Get build status",
        "build:read",
        ok={200: Answer("How far it is", shapes.ExecutionStatus)},
    ),
]
