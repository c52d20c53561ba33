"""Settings of a project: its name, repository, default branch, default workflow and retention."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.errors import Invalid, NotFound
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import audit, projects, tenants, workflows
from coordinator.tables import Project
from shared.faults import Fault
from shared.references import InvalidReference, branch_name, display_name, repo_url


def change_project(
    tx: Session, site: Site, caller: Caller, project_id: str, changes: dict[str, Any], *, now: datetime
) -> tuple[Project, str]:
    """Apply `changes` (field to value; None clears) or say everything that is wrong with them."""
    project = projects.get_project(tx, caller, project_id)
    checked = _checked(tx, site, project, changes)
    projects.change_project(tx, project, checked, now=now)
    audit.record(
        tx,
        caller,
        "project.changed",
        now=now,
        project_id=project.id,
        tenant_id=project.tenant_id,
        changes=checked,
    )
    return project, tenants.get_account(tx, project.tenant_id)


def _checked(tx: Session, site: Site, project: Project, changes: dict[str, Any]) -> dict[str, Any]:
    checks: dict[str, tuple[str, Callable[[str], str]]] = {
        "name": ("name", display_name),
        "repo_url": ("repoUrl", lambda text: repo_url(text, protocols=site.settings.allowed_git_protocols)),
        "default_branch": ("defaultBranch", branch_name),
    }
    checked: dict[str, Any] = {}
    faults = []
    for field, value in changes.items():
        if value is None and field == "name":
            faults.append(Fault("name", "cannot be cleared"))
        elif value is None:
            checked[field] = None
        elif field == "retention":
            checked[field] = value or None
        elif field == "default_workflow_id":
            checked[field] = value
            if not _is_workflow(tx, project, value):
                faults.append(Fault("defaultWorkflowId", "names no workflow of this project"))
        else:
            wire_name, check = checks[field]
            try:
                checked[field] = check(value)
            except InvalidReference as error:
                faults.append(Fault(wire_name, str(error)))
    if faults:
        raise Invalid("the project's settings are not valid", details=tuple(faults))
    return checked


def _is_workflow(tx: Session, project: Project, workflow_id: str) -> bool:
    try:
        workflows.get_workflow(tx, project.id, workflow_id)
    except NotFound:
        return False
    return True
