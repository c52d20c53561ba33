"""What of a project would go now, how much it is and why: a dry run."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.plan_retention import Weighed, plan_retention, weigh
from coordinator.rules.access import Caller
from coordinator.rules.retention import Retention
from coordinator.settings import Settings
from coordinator.store import projects


@dataclass(frozen=True)
class RetentionView:
    """The rules that hold and everything that they let go now."""

    project_id: str
    rules: Retention
    expires: list[Weighed]

    @property
    def size(self) -> int:
        return sum(one.size for one in self.expires)


def show_retention(
    tx: Session, settings: Settings, caller: Caller, project_id: str, *, now: datetime
) -> RetentionView:
    return rehearse(tx, settings, projects.get_project(tx, caller, project_id), now=now)


def rehearse(tx: Session, settings: Settings, project: Any, *, now: datetime) -> RetentionView:
    """The same for any project, also one that was deleted."""
    plan = plan_retention(tx, settings, project, now=now)
    return RetentionView(project.id, plan.rules, weigh(tx, project.id, plan.expiries))
