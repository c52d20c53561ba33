"""The operations of the Build Server API, each in a few lines."""

import asyncio

from starlette.responses import Response, StreamingResponse

from coordinator.actions.cancel_build import cancel_build as cancel_build_action
from coordinator.actions.change_project import change_project as change_project_action
from coordinator.actions.change_workflow import change_workflow as change_workflow_action
from coordinator.actions.create_build import BuildRequest
from coordinator.actions.create_build import create_build as create_build_action
from coordinator.actions.create_image import create_image as create_image_action
from coordinator.actions.create_project import create_project as create_project_action
from coordinator.actions.create_workflow import create_workflow as create_workflow_action
from coordinator.actions.delete_image import delete_image as delete_image_action
from coordinator.actions.delete_project import delete_project as delete_project_action
from coordinator.actions.delete_secret import delete_secret as delete_secret_action
from coordinator.actions.delete_workflow import delete_workflow as delete_workflow_action
from coordinator.actions.list_artifacts import list_artifacts as list_artifacts_action
from coordinator.actions.list_audit_logs import list_audit_logs as list_audit_logs_action
from coordinator.actions.list_builds import list_builds as list_builds_action
from coordinator.actions.list_images import list_images as list_images_action
from coordinator.actions.list_projects import list_projects as list_projects_action
from coordinator.actions.list_runners import list_runners as list_runners_action
from coordinator.actions.list_secrets import list_secrets as list_secrets_action
from coordinator.actions.list_workflows import list_workflows as list_workflows_action
from coordinator.actions.retry_build import retry_build as retry_build_action
from coordinator.actions.set_secret import set_secret as set_secret_action
from coordinator.actions.show_artifact import show_artifact as show_artifact_action
from coordinator.actions.show_build import show_all_rounds
from coordinator.actions.show_build import show_build as show_build_action
from coordinator.actions.show_cancel import show_cancel as show_cancel_action
from coordinator.actions.show_project import show_project as show_project_action
from coordinator.actions.show_retention import show_retention as show_retention_action
from coordinator.actions.show_step_log import show_step_log
from coordinator.actions.show_workflow import show_workflow as show_workflow_action
from coordinator.api import streams
from coordinator.api.build_server import shapes
from coordinator.api.build_server.operations import USER, error, operation
from coordinator.api.endpoint import Answer, Call, Endpoint, json_answer
from coordinator.bell import READY, STOPS
from coordinator.errors import NotFound
from coordinator.rules.access import Policy, Scope

WORKFLOW_BODY = 16 * 1024 * 1024
SECRET_BODY = 512 * 1024  # a value in which each byte is written as an escape


async def list_projects(call: Call) -> Response:
    found = await call.read(list_projects_action, call.caller, account=call.query.accountId)
    return json_answer([shapes.project_out(project, account) for project, account in found])


async def create_project(call: Call) -> Response:
    body: shapes.ProjectCreate = call.body
    project, account = await call.write(
        create_project_action, call.caller, account=body.account_id, name=body.name
    )
    return json_answer(shapes.project_out(project, account), 201)


async def show_project(call: Call) -> Response:
    return json_answer(
        shapes.project_out(*await call.read(show_project_action, call.caller, call.path["id"]))
    )


async def change_project(call: Call) -> Response:
    body: shapes.ProjectPatch = call.body
    changes = (call.path["id"], body.changes())
    changed = await call.write(change_project_action, call.state.site, call.caller, *changes)
    return json_answer(shapes.project_out(*changed))


async def delete_project(call: Call) -> Response:
    await call.write(delete_project_action, call.caller, call.path["id"])
    return Response(status_code=204)


async def list_secrets(call: Call) -> Response:
    found = await call.read(list_secrets_action, call.caller, call.path["id"])
    return json_answer([shapes.secret_out(row._mapping) for row in found])


async def set_secret(call: Call) -> Response:
    row, is_new = await call.write(
        set_secret_action,
        call.state.site,
        call.caller,
        call.path["id"],
        name=call.path["name"],
        value=call.body.value,
    )
    return json_answer(shapes.secret_out(row), 201) if is_new else Response(status_code=204)


async def delete_secret(call: Call) -> Response:
    await call.write(delete_secret_action, call.caller, call.path["id"], call.path["name"])
    return Response(status_code=204)


async def show_retention(call: Call) -> Response:
    where = (call.state.settings, call.caller, call.path["id"])
    view = await call.read(show_retention_action, *where, now=call.state.clock())
    return json_answer(shapes.retention_out(view))


async def list_workflows(call: Call) -> Response:
    found = await call.read(list_workflows_action, call.caller, call.path["id"])
    return json_answer([shapes.workflow_out(workflow) for workflow in found])


async def create_workflow(call: Call) -> Response:
    workflow = await call.write(
        create_workflow_action,
        call.state.site,
        call.caller,
        call.path["id"],
        name=call.raw_body.get("name"),
        steps=call.raw_body.get("steps"),
        unknown=call.body.unknown_fields(),
    )
    return json_answer(shapes.workflow_out(workflow), 201)


async def show_workflow(call: Call) -> Response:
    found = await call.read(show_workflow_action, call.caller, call.path["id"], call.path["workflowId"])
    return json_answer(shapes.workflow_detail(*found))


async def change_workflow(call: Call) -> Response:
    workflow = await call.write(
        change_workflow_action,
        call.state.site,
        call.caller,
        call.path["id"],
        call.path["workflowId"],
        name=call.raw_body.get("name"),
        steps=call.raw_body.get("steps"),
        unknown=call.body.unknown_fields(),
    )
    return json_answer(shapes.workflow_out(workflow))


async def delete_workflow(call: Call) -> Response:
    await call.write(delete_workflow_action, call.caller, call.path["id"], call.path["workflowId"])
    return Response(status_code=204)


async def list_builds(call: Call) -> Response:
    query: shapes.BuildPageQuery = call.query
    found, total = await call.read(
        list_builds_action, call.caller, call.path["id"], limit=query.limit, offset=query.offset
    )
    shown = [shapes.build_out(build) for build in found]
    page = shapes.pagination(total, query.limit, query.offset, len(shown))
    return json_answer(shapes.BuildPage(builds=shown, pagination=page))


async def create_build(call: Call) -> Response:
    request = BuildRequest(**call.body.model_dump())
    build = await call.write(create_build_action, call.state.site, call.caller, call.path["id"], request)
    call.state.bell.ring(READY)
    return json_answer(shapes.build_out(build), 201)


async def show_build(call: Call) -> Response:
    show = show_all_rounds if call.query.rounds == "all" else show_build_action
    return json_answer(shapes.build_detail(await call.read(show, call.caller, call.path["id"])))


async def retry_build(call: Call) -> Response:
    body: shapes.BuildRetry = call.body
    view = await call.write(retry_build_action, call.caller, call.path["id"], body.steps)
    call.state.bell.ring(READY)
    return json_answer(shapes.build_detail(view))


async def cancel_build(call: Call) -> Response:
    build = await call.write(cancel_build_action, call.state.site, call.caller, call.path["id"])
    call.state.bell.ring(STOPS)
    status = shapes.build_out(build).status
    receipt = shapes.CancelOut(cancel_id=build.cancel_id or "", build_id=build.id, status=status)
    return json_answer(receipt, 202)


async def show_cancel(call: Call) -> Response:
    now = call.state.clock()
    view = await call.read(show_cancel_action, call.caller, call.path["id"], now=now)
    return json_answer(shapes.cancel_detail(view))


async def list_artifacts(call: Call) -> Response:
    found = await call.read(list_artifacts_action, call.caller, call.path["id"])
    return json_answer([shapes.artifact_out(row) for row in found])


async def download_artifact(call: Call) -> Response:
    artifact = await call.read(show_artifact_action, call.caller, call.path["id"])
    blobs = call.state.site.blobs
    if artifact.type != "file":
        raise NotFound(f"this artifact is a {artifact.type} and has no bytes")
    if not await asyncio.to_thread(blobs.has, artifact.sha256, artifact.size):
        raise NotFound("the bytes of this artifact are gone")
    return streams.file_answer(
        call.request,
        blobs.path(artifact.sha256),
        artifact.size,
        media_type="application/octet-stream",
        etag=artifact.sha256,
        headers={
            "Content-Disposition": streams.attachment(artifact.path.rpartition("/")[2]),
            "Content-Security-Policy": "sandbox; default-src 'none'",
        },
    )


async def read_step_log(call: Call) -> Response:
    site, step_id, attempt = call.state.site, call.path["id"], call.query.attempt
    view = await call.read(show_step_log, site, call.caller, step_id, attempt=attempt)
    if not call.query.follow:
        return streams.file_answer(
            call.request,
            view.path,
            view.size,
            media_type="text/plain; charset=utf-8",
            etag=view.sha256 if not view.is_open else None,
            headers={"X-Log-State": "open" if view.is_open else view.state},
        )
    start = streams.last_event_id(call.request, view, asked_for=attempt)
    events = streams.follow_log(
        lambda: call.read_again(show_step_log, site, step_id=step_id, attempt=attempt),
        site.logs,
        call.state.bell,
        step_id,
        start,
    )
    return StreamingResponse(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})


async def list_images(call: Call) -> Response:
    found = await call.read(list_images_action, call.caller, public=call.query.public)
    return json_answer([shapes.image_out(image) for image in found])


async def create_image(call: Call) -> Response:
    body: shapes.DockerImageCreate = call.body
    image = await call.write(
        create_image_action,
        call.state.site,
        call.caller,
        slug=body.slug,
        image_url=body.image_url,
        public=body.public,
    )
    return json_answer(shapes.image_out(image), 201)


async def delete_image(call: Call) -> Response:
    await call.write(delete_image_action, call.caller, call.path["id"])
    return Response(status_code=204)


async def list_audit_logs(call: Call) -> Response:
    query: shapes.AuditQuery = call.query
    found, accounts, total = await call.read(
        list_audit_logs_action,
        call.caller,
        project_id=query.projectId,
        action=query.action,
        limit=query.limit,
        offset=query.offset,
    )
    shown = [shapes.audit_out(row, accounts) for row in found]
    page = shapes.pagination(total, query.limit, query.offset, len(shown))
    return json_answer(shapes.AuditPage(audit_logs=shown, pagination=page))


async def list_runners(call: Call) -> Response:
    found = await call.read(list_runners_action, call.caller)
    return json_answer([shapes.runner_out(runner, account) for runner, account in found])


def _user(permission: str, scope: Scope = Scope.RESOURCE) -> Policy:
    return Policy(USER, permission, scope)


_GONE = {204: Answer("Done")}
_IN_USE = {409: error("Still in use")}

ENDPOINTS: list[Endpoint] = [
    operation(
        "GET",
        "/api/projects",
        list_projects,
        "Get projects for an account",
        description="Retrieves all projects for the specified account",
        tag="Projects",
        policy=_user("project:list"),
        query=shapes.ByAccount,
        ok={200: Answer("List of projects", list[shapes.ProjectOut])},
        is_contract=True,
    ),
    operation(
        "POST",
        "/api/projects",
        create_project,
        "Create a new project",
        description="Creates a new project for the specified account",
        tag="Projects",
        policy=_user("project:create"),
        body=shapes.ProjectCreate,
        ok={201: Answer("Project created successfully", shapes.ProjectOut)},
        is_contract=True,
    ),
    operation(
        "GET",
        "/api/projects/{id}",
        show_project,
        "Get a project",
        tag="Projects",
        policy=_user("project:read"),
        ok={200: Answer("The project", shapes.ProjectOut)},
    ),
    operation(
        "PATCH",
        "/api/projects/{id}",
        change_project,
        "Change a project",
        description="Changes the fields that are named; null clears one.",
        tag="Projects",
        policy=_user("project:change"),
        body=shapes.ProjectPatch,
        ok={200: Answer("The project as it is now", shapes.ProjectOut)},
    ),
    operation(
        "DELETE",
        "/api/projects/{id}",
        delete_project,
        "Delete a project",
        description="Refused while one of its builds has not ended.",
        tag="Projects",
        policy=_user("project:delete"),
        ok=_GONE,
        errors=_IN_USE,
    ),
    operation(
        "GET",
        "/api/projects/{id}/secrets",
        list_secrets,
        "Get the names of a project's secrets",
        description="By name. No operation answers a value.",
        tag="Secrets",
        policy=_user("secret:list"),
        ok={200: Answer("List of secrets", list[shapes.SecretOut])},
    ),
    operation(
        "PUT",
        "/api/projects/{id}/secrets/{name}",
        set_secret,
        "Set a secret",
        description="Steps that name the secret are given the value that is set when a runner takes them.",
        tag="Secrets",
        policy=_user("secret:set"),
        body=shapes.SecretPut,
        body_limit=SECRET_BODY,
        ok={201: Answer("The name is new", shapes.SecretOut), 204: Answer("The value is replaced")},
        parameters={"name": "Name of the secret: A-Z, 0-9 and _, not beginning with a digit, at most 64"},
    ),
    operation(
        "DELETE",
        "/api/projects/{id}/secrets/{name}",
        delete_secret,
        "Delete a secret",
        description="Attempts that were given it keep it.",
        tag="Secrets",
        policy=_user("secret:delete"),
        ok=_GONE,
        parameters={"name": "Name of the secret"},
    ),
    operation(
        "GET",
        "/api/projects/{id}/retention",
        show_retention,
        "Get what retention would let go now",
        description="A dry run: nothing changes. What is listed goes within the next minutes.",
        tag="Projects",
        policy=_user("project:read"),
        ok={200: Answer("The rules and what they let go", shapes.RetentionPlanOut)},
    ),
    operation(
        "GET",
        "/api/projects/{id}/workflows",
        list_workflows,
        "Get workflows for a project",
        description="Retrieves all workflows for the specified project",
        tag="Workflows",
        policy=_user("workflow:list"),
        ok={200: Answer("List of workflows", list[shapes.WorkflowOut])},
        is_contract=True,
    ),
    operation(
        "POST",
        "/api/projects/{id}/workflows",
        create_workflow,
        "Create a new workflow",
        description="Creates a new workflow for the specified project. A refusal names every fault.",
        tag="Workflows",
        policy=_user("workflow:create"),
        body=shapes.WorkflowBody,
        documented_body=shapes.WorkflowCreate,
        body_limit=WORKFLOW_BODY,
        ok={201: Answer("Workflow created successfully", shapes.WorkflowOut)},
        is_contract=True,
    ),
    operation(
        "GET",
        "/api/projects/{id}/workflows/{workflowId}",
        show_workflow,
        "Get a workflow with its steps",
        tag="Workflows",
        policy=_user("workflow:read"),
        ok={200: Answer("The workflow", shapes.WorkflowDetail)},
    ),
    operation(
        "PUT",
        "/api/projects/{id}/workflows/{workflowId}",
        change_workflow,
        "Replace a workflow by a new version",
        description="Builds made before keep the version they were made with.",
        tag="Workflows",
        policy=_user("workflow:change"),
        body=shapes.WorkflowBody,
        documented_body=shapes.WorkflowCreate,
        body_limit=WORKFLOW_BODY,
        ok={200: Answer("The workflow as it is now", shapes.WorkflowOut)},
    ),
    operation(
        "DELETE",
        "/api/projects/{id}/workflows/{workflowId}",
        delete_workflow,
        "Delete a workflow",
        tag="Workflows",
        policy=_user("workflow:delete"),
        ok=_GONE,
    ),
    operation(
        "GET",
        "/api/projects/{id}/builds",
        list_builds,
        "Get builds for a project",
        description="Retrieves builds for the specified project with pagination, newest first",
        tag="Builds",
        policy=_user("build:list"),
        query=shapes.BuildPageQuery,
        ok={200: Answer("List of builds with pagination info", shapes.BuildPage)},
        is_contract=True,
    ),
    operation(
        "POST",
        "/api/projects/{id}/builds",
        create_build,
        "Create a new build",
        description="Creates a new build for the specified project using a workflow",
        tag="Builds",
        policy=_user("build:create"),
        body=shapes.BuildCreate,
        ok={201: Answer("Build created successfully", shapes.BuildOut)},
        is_contract=True,
    ),
    operation(
        "GET",
        "/api/builds/{id}",
        show_build,
        "Get a build with its steps and their attempts",
        tag="Builds",
        description="Each step as its latest row shows it; with `rounds=all` the rows of every round.",
        policy=_user("build:read"),
        query=shapes.BuildQuery,
        ok={200: Answer("The build", shapes.BuildDetail)},
    ),
    operation(
        "POST",
        "/api/builds/{id}/retry",
        retry_build,
        "Run a build again in a new round",
        description="Steps that have succeeded keep their outputs and steps that have not ended go on; "
        "the others get fresh rows with new ids. Also while other steps still run.",
        tag="Builds",
        policy=_user("build:retry"),
        body=shapes.BuildRetry,
        ok={200: Answer("The build in its new round", shapes.BuildDetail)},
        errors={409: error("Nothing to run again, or the build is being stopped")},
    ),
    operation(
        "POST",
        "/api/builds/{id}/cancel",
        cancel_build,
        "Cancel a build",
        description="What waits ends at once; what runs is told to stop. Asked again, the same receipt.",
        tag="Builds",
        policy=_user("build:cancel"),
        ok={202: Answer("The receipt", shapes.CancelOut)},
        errors={409: error("The build has ended")},
    ),
    operation(
        "GET",
        "/api/cancels/{id}",
        show_cancel,
        "Get the receipt of a cancellation",
        description="`running` until every step has ended and is confirmed, or has not been for a minute. "
        "A step is confirmed when nobody held it, or when its runner has said that nothing of it is left.",
        tag="Builds",
        policy=_user("build:read"),
        ok={200: Answer("What has become of each step that had to stop", shapes.CancelDetail)},
        parameters={"id": "The receipt's id"},
    ),
    operation(
        "GET",
        "/api/builds/{id}/artifacts",
        list_artifacts,
        "Get the artifacts of a build",
        tag="Builds",
        policy=_user("build:read"),
        ok={200: Answer("List of artifacts", list[shapes.ArtifactOut])},
    ),
    operation(
        "GET",
        "/api/artifacts/{id}",
        download_artifact,
        "Download an artifact",
        description="Takes Range and If-None-Match; the ETag is the SHA-256 of the bytes.",
        tag="Builds",
        policy=_user("build:read"),
        ok={
            200: Answer("The bytes", bytes, "application/octet-stream"),
            206: Answer("The range of bytes that was asked for", bytes, "application/octet-stream"),
            304: Answer("Not changed"),
        },
        errors={416: error("The range lies outside the artifact")},
    ),
    operation(
        "GET",
        "/api/steps/{id}/log",
        read_step_log,
        "Read the log of a step",
        description="The bytes as they were printed, or with `follow=true` server-sent events until the "
        "step has ended. Events are `log` (`offset`, `text`, and `base64` of bytes that are no text), "
        "`attempt` (another attempt has begun and its log comes from the start) and `end`. "
        "Their ids are `<attempt>:<offset>`; a reader resumes with Last-Event-ID.",
        tag="Builds",
        policy=_user("build:read"),
        query=shapes.LogQuery,
        ok={
            200: Answer("The log", str, "text/plain", ("text/event-stream",)),
            206: Answer("The range of bytes that was asked for", str, "text/plain"),
            304: Answer("Not changed"),
        },
        errors={416: error("The range lies outside the log")},
    ),
    operation(
        "GET",
        "/api/docker-images",
        list_images,
        "Get docker images",
        description="Retrieves all docker images, optionally filtered to public only",
        tag="Docker Images",
        policy=_user("image:list", Scope.TENANT),
        query=shapes.ImageQuery,
        ok={200: Answer("List of docker images", list[shapes.DockerImageOut])},
        is_contract=True,
    ),
    operation(
        "POST",
        "/api/docker-images",
        create_image,
        "Create a new docker image",
        description="Creates a new docker image that can be used in workflows",
        tag="Docker Images",
        policy=_user("image:create", Scope.TENANT),
        body=shapes.DockerImageCreate,
        ok={201: Answer("Docker image created successfully", shapes.DockerImageOut)},
        errors={409: error("Docker image with this slug already exists")},
        is_contract=True,
    ),
    operation(
        "DELETE",
        "/api/docker-images/{id}",
        delete_image,
        "Delete a docker image",
        description="Refused while a workflow uses it.",
        tag="Docker Images",
        policy=_user("image:delete"),
        ok=_GONE,
        errors=_IN_USE,
    ),
    operation(
        "GET",
        "/api/audit-logs",
        list_audit_logs,
        "Get audit logs",
        description="Retrieves audit logs with optional filtering and pagination, newest first",
        tag="Audit",
        policy=_user("audit:read", Scope.TENANT),
        query=shapes.AuditQuery,
        ok={200: Answer("List of audit logs with pagination info", shapes.AuditPage)},
        is_contract=True,
    ),
    operation(
        "GET",
        "/api/runners",
        list_runners,
        "Get the runners",
        description="Those that take steps of the tenant: its own and the shared ones.",
        tag="Runner",
        policy=_user("runner:list", Scope.TENANT),
        ok={200: Answer("List of runners", list[shapes.RunnerOut])},
    ),
]
