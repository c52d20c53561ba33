"""One build with its steps and their attempts."""

from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from coordinator.errors import NotFound
from coordinator.rules.access import Caller
from coordinator.store import attempts, builds, projects, rounds, steps
from coordinator.tables import Build


@dataclass(frozen=True)
class BuildView:
    """A build and everything shown with it."""

    build: Build
    steps: list[Any]
    attempts: dict[str, list[Any]]


def get_visible_build(tx: Session, caller: Caller, build_id: str) -> Build:
    """The build, if the caller may see its project."""
    build = builds.get_build(tx, build_id)
    try:
        projects.get_project(tx, caller, build.project_id)
    except NotFound as error:
        raise NotFound("no such build") from error
    return build


def show_build(tx: Session, caller: Caller, build_id: str) -> BuildView:
    """The build as it stands: each step once, by its latest row."""
    build = get_visible_build(tx, caller, build_id)
    return _view(tx, build, steps.list_steps(tx, build.id))


def show_all_rounds(tx: Session, caller: Caller, build_id: str) -> BuildView:
    """The build with the rows of every round."""
    build = get_visible_build(tx, caller, build_id)
    return _view(tx, build, rounds.list_all_steps(tx, build.id))


def _view(tx: Session, build: Build, rows: list[Any]) -> BuildView:
    return BuildView(build, rows, attempts.list_attempts(tx, [row.id for row in rows]))
