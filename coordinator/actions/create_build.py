"""A new build of a workflow: everything it needs is copied in."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.errors import Invalid, NotFound
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, builds, images, projects, steps, workflows
from coordinator.tables import Build, DockerImage, Project, Workflow
from shared.faults import Fault
from shared.ids import new_id
from shared.plan import InvalidPlan, Plan, plan_steps
from shared.references import InvalidReference, branch_name, commit_hash, image_reference, repo_url
from shared.states import BuildState


@dataclass(frozen=True)
class BuildRequest:
    """What a caller says of the build it wants."""

    workflow_id: str
    repo_url: str | None = None
    branch: str | None = None
    commit_hash: str | None = None
    commit_message: str | None = None
    commit_author: str | None = None
    timeout_seconds: int | None = None


def create_build(
    tx: Session, site: Site, caller: Caller, project_id: str, request: BuildRequest, *, now: datetime
) -> Build:
    """Make the build, and let runners have its first steps."""
    project = projects.get_project(tx, caller, project_id)
    request = canonical(site, request)
    workflow = _workflow_of(tx, project, request.workflow_id)
    return insert_build(tx, site, caller, project, workflow, request, state=BuildState.QUEUED, now=now)


def insert_build(
    tx: Session,
    site: Site,
    caller: Caller,
    project: Project,
    workflow: Workflow,
    request: BuildRequest,
    *,
    state: BuildState,
    retry_of: str | None = None,
    now: datetime,
) -> Build:
    """Write down the build and its steps. Later changes of workflow or image never change it.

    One that is only CREATED waits to be started: none of its steps is ready. The request is canonical.
    """
    plan, found = _plan(tx, site, project, workflows.get_steps(tx, workflow))
    build = Build(
        id=new_id(),
        project_id=project.id,
        workflow_id=workflow.id,
        workflow_version=workflow.version,
        number=projects.take_build_number(tx, project.id),
        state=state,
        retry_of=retry_of,
        commit_message=request.commit_message,
        commit_author=request.commit_author,
        timeout_s=request.timeout_seconds,
        created_at=now,
        updated_at=now,
        **_source(project, request),
    )
    builds.insert_build(tx, build)
    _insert_steps(tx, build, plan, found, now=now)
    audit.record(
        tx,
        caller,
        "build.created",
        now=now,
        project_id=project.id,
        tenant_id=project.tenant_id,
        buildId=build.id,
        number=build.number,
        workflowId=workflow.id,
        retryOf=retry_of,
    )
    return build


def canonical(site: Site, request: BuildRequest) -> BuildRequest:
    """The request with its references in their canonical form, or Invalid with every fault."""
    protocols = site.settings.allowed_git_protocols
    checks: tuple[tuple[str, str, Callable[[str], str]], ...] = (
        ("repo_url", "repoUrl", lambda text: repo_url(text, protocols=protocols)),
        ("branch", "branch", branch_name),
        ("commit_hash", "commitHash", commit_hash),
    )
    faults = []
    canonical: dict[str, Any] = {}
    for field, wire_name, check in checks:
        value = getattr(request, field)
        if value is None:
            continue
        try:
            canonical[field] = check(value)
        except InvalidReference as error:
            faults.append(Fault(wire_name, str(error)))
    if faults:
        raise Invalid("the build is not valid", details=tuple(faults))
    return replace(request, **canonical)


def _workflow_of(tx: Session, project: Project, workflow_id: str) -> Any:
    try:
        return workflows.get_workflow(tx, project.id, workflow_id)
    except NotFound as error:
        raise NotFound("no such workflow in this project") from error


def _source(project: Project, request: BuildRequest) -> dict[str, Any]:
    """Where the files come from: what the request says, else what the project says, else nowhere."""
    url = request.repo_url or project.repo_url
    branch = request.branch
    if url is None:
        return {
            "branch": branch,
            "requested_commit": request.commit_hash,
            "commit_hash": request.commit_hash,
        }
    is_project_repository = project.repo_url is not None and url == project.repo_url
    if branch is None and request.commit_hash is None and is_project_repository:
        branch = project.default_branch
    commit = request.commit_hash
    is_full = commit is not None and len(commit) in (40, 64)
    return {
        "repo_url": url,
        "branch": branch,
        "requested_commit": commit,
        "commit_hash": commit if is_full else None,
        "is_project_repository": is_project_repository,
        "default_branch": project.default_branch,
    }


def _plan(
    tx: Session, site: Site, project: Project, stored: list[dict[str, Any]]
) -> tuple[Plan, dict[str, DockerImage]]:
    found: dict[str, DockerImage] = {}

    def known_images(slugs: Any) -> Any:
        found.update(
            images.find_images(tx, slugs, tenant_id=project.tenant_id, common_tenant_id=site.common_images)
        )
        return found

    try:
        return plan_steps(stored, known_images=known_images), found
    except InvalidPlan as error:
        raise Invalid("the workflow can no longer be built", details=error.faults) from error


def _insert_steps(
    tx: Session, build: Build, plan: Plan, found: dict[str, DockerImage], *, now: datetime
) -> None:
    ids = [new_id() for _ in plan.steps]
    rows, labels, dependencies = [], [], []
    for planned, step_id in zip(plan.steps, ids, strict=True):
        spec = planned.spec
        is_ready = build.state == BuildState.QUEUED and not planned.depends_on
        rows.append(
            {
                "id": step_id,
                "build_id": build.id,
                "project_id": build.project_id,
                "name": spec.name,
                "round": 1,
                "position": planned.position,
                "rank": planned.rank,
                "spec": spec.model_dump(by_alias=True, mode="json"),
                "image_url": image_reference(found[spec.image_slug].image_url),
                "label_count": len(spec.labels),
                "dependency_count": len(planned.depends_on),
                "exclusive": spec.exclusive,
                "queue_limit_s": spec.queue_timeout_seconds,
                **steps.never_claimed(is_ready=is_ready, now=now),
            }
        )
        labels += [{"step_id": step_id, "label": label} for label in spec.labels]
        dependencies += [
            {"step_id": step_id, "depends_on_id": ids[other], "build_id": build.id}
            for other in planned.depends_on
        ]
    steps.insert_steps(tx, rows, labels, dependencies)
