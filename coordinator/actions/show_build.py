"""One build with its steps and their attempts."""

from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from coordinator.actions.refuse_expired import refuse_expired
from coordinator.errors import Expired, NotFound
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
    """The build, if the caller may see its project and it has not expired."""
    try:
        build = builds.get_build(tx, build_id)
    except NotFound:
        refuse_expired(tx, caller, build_id)
        raise
    try:
        projects.get_project(tx, caller, build.project_id)
    except NotFound as error:
        raise type(error)("no such build") from error
    if build.expired_at is not None:
        raise Expired("this build has expired or was deleted")
    return build


def get_visible_step(tx: Session, caller: Caller, step_id: str) -> tuple[Any, Build]:
    """A step and its build, if the caller may see them and they have not expired."""
    try:
        step = steps.get_step(tx, step_id)
    except NotFound:
        refuse_expired(tx, caller, step_id)
        raise
    try:
        return step, get_visible_build(tx, caller, step.build_id)
    except Expired as error:
        raise Expired("this step has expired or was deleted") from error
    except NotFound as error:
        raise type(error)("no such step") from error


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
