"""A build that has failed or was cancelled is to run again, as a new build that waits to be started."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.create_build import BuildRequest, canonical, insert_build
from coordinator.actions.show_build import get_visible_build
from coordinator.errors import Conflict, NotFound
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, builds, projects, workflows
from coordinator.tables import Build, Workflow
from shared.states import BuildState

REPEATABLE = frozenset({BuildState.FAILED, BuildState.CANCELLED})


def repeat_build(tx: Session, site: Site, caller: Caller, build_id: str, *, now: datetime) -> Build:
    """A new build of the same source by the same workflow, as that is now.

    The commit that the old build was bound to binds the new one too, wherever its branch points by now.
    """
    projects.lock_project(tx, get_visible_build(tx, caller, build_id).project_id)
    builds.lock_build(tx, build_id)
    tx.expire_all()
    old = get_visible_build(tx, caller, build_id)
    if BuildState(old.state) not in REPEATABLE:
        raise Conflict("only a build that has failed or was cancelled can be retried")
    project = projects.get_project(tx, caller, old.project_id)
    workflow = _workflow_of(tx, old)
    request = BuildRequest(
        workflow.id,
        repo_url=old.repo_url,
        branch=old.branch,
        commit_hash=old.commit_hash or old.requested_commit,
        commit_message=old.commit_message,
        commit_author=old.commit_author,
        timeout_seconds=old.timeout_s,
    )
    new = insert_build(
        tx,
        site,
        caller,
        project,
        workflow,
        canonical(site, request),
        state=BuildState.CREATED,
        retry_of=old.id,
        now=now,
    )
    about = {"buildId": old.id, "retriedBy": new.id}
    audit.record(tx, caller, "build.retried", now=now, project_id=project.id, **about)
    return new


def _workflow_of(tx: Session, build: Build) -> Workflow:
    try:
        return workflows.get_workflow(tx, build.project_id, build.workflow_id)
    except NotFound as error:
        raise Conflict("the workflow of this build was deleted") from error
