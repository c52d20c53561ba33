"""A retry as a new build: what it has of the old one, and what it takes anew."""

import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.change_project import change_project
from coordinator.actions.change_workflow import change_workflow
from coordinator.actions.delete_workflow import delete_workflow
from coordinator.actions.repeat_build import repeat_build
from coordinator.actions.start_build import start_build
from coordinator.errors import Conflict
from coordinator.store import builds, steps
from coordinator.tables import Build
from tests.factories import LOCAL, MadeBuild, Mill, a_spec, together

SOURCE = {"repo_url": "https://git.example/owner/name", "branch": "main"}


def a_cancelled_build(mill: Mill, **source: str) -> MadeBuild:
    build = mill.a_build(a_spec(build=[], test=["build"]), **(source or SOURCE))
    mill.now(cancel_build, mill.site, LOCAL, build.id)
    return build


def repeat(mill: Mill, build: MadeBuild) -> Build:
    return mill.now(repeat_build, mill.site, LOCAL, build.id)


def test_the_new_build_waits_to_be_started_and_then_runs_all_steps(mill: Mill) -> None:
    again = repeat(mill, a_cancelled_build(mill))

    waiting = mill.acquire(mill.a_runner())
    mill.now(start_build, LOCAL, again.id)
    [held] = mill.acquire(mill.a_runner())

    assert (again.state, waiting) == ("created", [])
    assert held.claim.build_id == again.id
    assert held.claim.source.repo_url == SOURCE["repo_url"]


def test_it_has_the_commit_that_the_old_build_was_bound_to(mill: Mill) -> None:
    build = a_cancelled_build(mill)
    mill.now(builds.bind_commit, build.id, "a" * 40)

    again = repeat(mill, build)

    assert (again.requested_commit, again.commit_hash, again.branch) == ("a" * 40, "a" * 40, "main")


def test_a_build_that_never_learned_its_commit_takes_the_newest(mill: Mill) -> None:
    again = repeat(mill, a_cancelled_build(mill))

    assert (again.requested_commit, again.commit_hash, again.branch) == (None, None, "main")


def test_it_stays_with_its_repository_when_the_project_gets_another(mill: Mill) -> None:
    build = a_cancelled_build(mill)
    mill.now(change_project, mill.site, LOCAL, build.project_id, {"repo_url": "https://git.example/other"})

    again = repeat(mill, build)

    assert again.repo_url == SOURCE["repo_url"]
    assert not again.is_project_repository  # so that it has no part in the caches of the default branch


def test_it_runs_the_workflow_as_that_is_now(mill: Mill) -> None:
    build = a_cancelled_build(mill)
    mended = a_spec(build=[], test=["build"], publish=["test"])
    workflow = (build.project_id, build.workflow_id)
    mill.now(change_workflow, mill.site, LOCAL, *workflow, name="a workflow", steps=mended)

    again = repeat(mill, build)

    assert (again.workflow_id, again.workflow_version) == (build.workflow_id, 2)
    assert [row.name for row in mill.tx(steps.list_steps, again.id)] == ["build", "test", "publish"]
    assert list(mill.states(build)) == ["build", "test"]


def test_without_its_workflow_it_cannot_run_again(mill: Mill) -> None:
    build = a_cancelled_build(mill)
    mill.now(delete_workflow, LOCAL, build.project_id, build.workflow_id)

    with pytest.raises(Conflict, match="workflow of this build was deleted"):
        repeat(mill, build)


def test_a_build_may_be_repeated_more_than_once_and_each_gets_a_number(mill: Mill) -> None:
    build = a_cancelled_build(mill)

    made = together(*[lambda: repeat(mill, build).number] * 6)

    assert sorted(made) == [2, 3, 4, 5, 6, 7]  # type: ignore[type-var]


def test_one_that_was_never_started_can_be_repeated_after_its_cancel(mill: Mill) -> None:
    first = repeat(mill, a_cancelled_build(mill))
    with pytest.raises(Conflict, match="failed or was cancelled"):
        mill.now(repeat_build, mill.site, LOCAL, first.id)
    mill.now(cancel_build, mill.site, LOCAL, first.id)

    second = mill.now(repeat_build, mill.site, LOCAL, first.id)

    assert second.retry_of == first.id
