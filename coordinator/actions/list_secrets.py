"""The secrets of a project: their names, never their values."""

from typing import Any

from sqlmodel import Session

from coordinator.rules.access import Caller
from coordinator.store import project_secrets, projects


def list_secrets(tx: Session, caller: Caller, project_id: str) -> list[Any]:
    project = projects.get_project(tx, caller, project_id)
    return project_secrets.list_current(tx, project.id)
