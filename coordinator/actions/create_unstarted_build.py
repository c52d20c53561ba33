"""A new build of the Build Execution API: written down with all it needs, and run by nobody yet."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.create_build import BuildRequest, insert_build
from coordinator.errors import Invalid
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import projects, workflows
from coordinator.tables import Build, Project, Workflow
from shared.faults import Fault
from shared.states import BuildState


def create_unstarted_build(
    tx: Session,
    site: Site,
    caller: Caller,
    project_id: str,
    *,
    branch: str,
    commit: str | None,
    now: datetime,
) -> Build:
    """A build of the project's own repository by its own workflow; both must be settled there."""
    project = projects.get_project(tx, caller, project_id)
    workflow = _workflow_of(tx, project)
    if project.repo_url is None:
        raise _cannot_be_built("has no repository; set one with its repo_url")
    request = BuildRequest(workflow.id, branch=branch, commit_hash=commit)
    return insert_build(tx, site, caller, project, workflow, request, state=BuildState.CREATED, now=now)


def _workflow_of(tx: Session, project: Project) -> Workflow:
    """The project's default workflow, else the only one it has."""
    known = workflows.list_workflows(tx, project.id)
    chosen = [workflow for workflow in known if workflow.id == project.default_workflow_id] or known
    if not chosen:
        raise _cannot_be_built("has no workflow")
    if len(chosen) > 1:
        raise _cannot_be_built("has several workflows; set one of them as its default_workflow_id")
    return chosen[0]


def _cannot_be_built(why: str) -> Invalid:
    return Invalid(f"the project {why}", details=(Fault("project_id", f"names a project that {why}"),))
