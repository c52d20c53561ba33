"""Builds that are made first and started later: what they are until then, and what the start changes."""

from collections.abc import Callable
from datetime import timedelta

import pytest

from coordinator.actions.cancel_build import cancel_build, cancel_unfinished_build
from coordinator.actions.change_project import change_project
from coordinator.actions.complete_step import complete_bare_step
from coordinator.actions.create_unstarted_build import create_unstarted_build
from coordinator.actions.delete_project import delete_project
from coordinator.actions.plan_retention import plan_retention
from coordinator.actions.retry_build import StepsToRetry, retry_build
from coordinator.actions.start_build import start_build
from coordinator.actions.take_measure import take_measure
from coordinator.errors import Conflict, InUse, Invalid, NotRunnable
from coordinator.store import retention, steps
from coordinator.tables import Build
from shared.protocol import Completion
from tests.factories import LOCAL, Held, MadeBuild, Mill, a_spec, a_step, together

REPOSITORY = "https://git.example/owner/name"


def a_repository(mill: Mill) -> str:
    """A project with a repository."""
    project_id = mill.a_project()
    mill.now(change_project, mill.site, LOCAL, project_id, {"repo_url": REPOSITORY})
    return project_id


def a_created_build(mill: Mill, spec: list[dict[str, object]] | None = None) -> MadeBuild:
    project_id = a_repository(mill)
    workflow_id = mill.a_workflow(project_id, spec or a_spec(build=[], test=["build"]))
    return another(mill, project_id, workflow_id)


def another(mill: Mill, project_id: str, workflow_id: str = "") -> MadeBuild:
    build = mill.now(create_unstarted_build, mill.site, LOCAL, project_id, branch="main", commit=None)
    ids = {row.name: row.id for row in mill.tx(steps.list_steps, build.id)}
    return MadeBuild(build.id, project_id, workflow_id, ids)


def start(mill: Mill, build: MadeBuild) -> Build:
    return mill.now(start_build, LOCAL, build.id)


# What it is before it is started


def test_nothing_of_a_build_can_be_claimed_before_it_is_started(mill: Mill) -> None:
    build = a_created_build(mill)

    assert mill.acquire(mill.a_runner()) == []
    assert mill.states(build) == {"build": "pending", "test": "pending"}
    assert mill.build(build.id).state == "created"


def test_a_client_without_a_lease_cannot_complete_a_step_of_it(mill: Mill) -> None:
    build = a_created_build(mill)
    said = Completion(status="success")

    with pytest.raises(NotRunnable, match="has not been started"):
        mill.now(complete_bare_step, mill.site, LOCAL, build.steps["build"], said)

    assert mill.states(build) == {"build": "pending", "test": "pending"}


def test_no_limit_runs_before_the_start(mill: Mill) -> None:
    build = a_created_build(mill, [a_step("build", queueTimeoutSeconds=60)])

    mill.clock.advance(30 * 86400)
    mill.expire()

    assert mill.build(build.id).state == "created"
    assert mill.states(build) == {"build": "pending"}


def test_the_queue_limit_counts_from_the_start(mill: Mill) -> None:
    build = a_created_build(mill, [a_step("build", queueTimeoutSeconds=60)])
    mill.clock.advance(3600)
    start(mill, build)

    mill.clock.advance(59)
    mill.expire()
    before = mill.states(build)
    mill.clock.advance(2)
    mill.expire()

    assert before == {"build": "ready"}
    assert mill.states(build) == {"build": "failed"}


def test_retention_keeps_what_was_never_started(mill: Mill) -> None:
    build = a_created_build(mill)
    settings = mill.state.settings.model_copy(update={"retain_build_days": 1, "retain_builds": 1})
    another(mill, build.project_id)
    later = mill.clock.advance(400 * 86400)

    projects = mill.tx(retention.list_projects)
    plan = mill.tx(plan_retention, settings, projects[0], now=later)

    assert plan.expiries == []


def test_it_counts_as_created_and_its_steps_as_pending(mill: Mill) -> None:
    a_created_build(mill)

    measure = mill.tx(take_measure, now=mill.clock(), lost_after=timedelta(seconds=60))

    assert (measure.builds["created"], measure.builds["queued"]) == (1, 0)
    assert measure.steps["ready"] == 0
    assert measure.oldest_ready_s == 0.0


def test_its_project_cannot_be_deleted_below_it(mill: Mill) -> None:
    build = a_created_build(mill)

    with pytest.raises(InUse):
        mill.now(delete_project, LOCAL, build.project_id)


def test_it_cannot_be_run_again_in_a_new_round(mill: Mill) -> None:
    build = a_created_build(mill)

    with pytest.raises(Conflict, match="has not been started"):
        mill.now(retry_build, LOCAL, build.id, StepsToRetry.ALL)


# Which workflow, which source


def test_it_runs_the_default_workflow_of_its_project(mill: Mill) -> None:
    project_id = a_repository(mill)
    mill.a_workflow(project_id, a_spec(other=[]))
    default = mill.a_workflow(project_id, a_spec(build=[]))
    mill.now(change_project, mill.site, LOCAL, project_id, {"default_workflow_id": default})

    build = another(mill, project_id)

    assert mill.build(build.id).workflow_id == default
    assert set(build.steps) == {"build"}


def test_of_several_workflows_one_must_be_the_default(mill: Mill) -> None:
    project_id = a_repository(mill)
    mill.a_workflow(project_id, a_spec())
    mill.a_workflow(project_id, a_spec())

    with pytest.raises(Invalid, match="several workflows") as refused:
        another(mill, project_id)

    assert [fault.path for fault in refused.value.details] == ["project_id"]


def test_a_project_without_a_workflow_cannot_be_built(mill: Mill) -> None:
    with pytest.raises(Invalid, match="no workflow"):
        another(mill, a_repository(mill))


def test_a_project_without_a_repository_cannot_be_built(mill: Mill) -> None:
    project_id = mill.a_project()
    mill.a_workflow(project_id, a_spec())

    with pytest.raises(Invalid, match="no repository"):
        another(mill, project_id)


def test_what_is_refused_takes_no_number(mill: Mill) -> None:
    project_id = a_repository(mill)
    with pytest.raises(Invalid):
        another(mill, project_id)
    mill.a_workflow(project_id, a_spec())

    build = another(mill, project_id)

    assert mill.build(build.id).number == 1


def test_numbers_have_no_gaps_and_no_duplicates_whoever_asks_at_once(mill: Mill) -> None:
    project_id = a_repository(mill)
    workflow_id = mill.a_workflow(project_id, a_spec())

    made = together(
        *[lambda: mill.build(another(mill, project_id).id).number] * 8,
        *[lambda: mill.build(mill.another_build(project_id, workflow_id).id).number] * 4,
    )

    assert sorted(made) == list(range(1, 13))  # type: ignore[type-var]


# The start


def test_the_start_lets_runners_have_the_steps_that_depend_on_none(mill: Mill) -> None:
    build = a_created_build(mill)

    started = start(mill, build)

    assert started.state == "queued"
    assert mill.states(build) == {"build": "ready", "test": "pending"}
    assert [held.step_id for held in mill.acquire(mill.a_runner(), slots=5)] == [build.steps["build"]]
    assert mill.build(build.id).state == "running"


def test_a_started_build_runs_to_its_end(mill: Mill) -> None:
    build = a_created_build(mill)
    runner = mill.a_runner()
    start(mill, build)

    for _ in build.steps:
        [held] = mill.acquire(runner)
        mill.start(held)
        mill.complete(held)

    assert mill.build(build.id).state == "succeeded"


def test_it_is_started_once(mill: Mill) -> None:
    build = a_created_build(mill)

    said = together(*[lambda: start(mill, build)] * 5)

    assert sum(isinstance(one, Conflict) for one in said) == 4
    assert mill.build(build.id).state == "queued"
    assert len(mill.audited("build.started")) == 1


def test_a_build_that_has_ended_cannot_be_started(mill: Mill) -> None:
    build = a_created_build(mill)
    mill.now(cancel_build, mill.site, LOCAL, build.id)

    with pytest.raises(Conflict, match="has ended"):
        start(mill, build)

    assert mill.states(build) == {"build": "cancelled", "test": "cancelled"}


def test_of_a_start_and_a_cancel_at_the_same_moment_the_build_is_cancelled_all_the_same(mill: Mill) -> None:
    build = a_created_build(mill)

    together(lambda: start(mill, build), lambda: mill.now(cancel_build, mill.site, LOCAL, build.id))

    assert mill.build(build.id).state == "cancelled"
    assert mill.acquire(mill.a_runner()) == []


# The cancel


def test_a_build_that_was_never_started_ends_at_once_when_it_is_cancelled(mill: Mill) -> None:
    build = a_created_build(mill)

    cancelled = mill.now(cancel_unfinished_build, mill.site, LOCAL, build.id)

    assert (cancelled.state, cancelled.reason) == ("cancelled", "cancelled")
    assert cancelled.finished_at == mill.clock()
    assert cancelled.started_at is None
    assert mill.states(build) == {"build": "cancelled", "test": "cancelled"}


def test_what_is_being_cancelled_may_be_cancelled_again_until_it_has_ended(mill: Mill) -> None:
    build = a_created_build(mill, a_spec(build=[]))
    start(mill, build)
    [held] = mill.acquire(mill.a_runner())
    mill.start(held)

    states = [mill.now(cancel_unfinished_build, mill.site, LOCAL, build.id).state for _ in range(2)]
    mill.complete(held, "failed")

    assert states == ["cancelling", "cancelling"]
    with pytest.raises(Conflict, match="has ended"):
        mill.now(cancel_unfinished_build, mill.site, LOCAL, build.id)


# When it last moved


def test_every_move_of_a_build_is_noted(mill: Mill) -> None:
    build = a_created_build(mill, a_spec(build=[]))
    runner = mill.a_runner()
    held: list[Held] = []

    def finish() -> None:
        mill.start(held[0])
        mill.complete(held[0], "failed")

    moves: list[Callable[[], object]] = [
        lambda: start(mill, build),
        lambda: held.extend(mill.acquire(runner)),
        finish,
        lambda: mill.now(retry_build, LOCAL, build.id, StepsToRetry.ALL),
        lambda: mill.now(cancel_build, mill.site, LOCAL, build.id),
    ]
    noted = [mill.build(build.id).updated_at]
    expected = [mill.clock()]
    for move in moves:
        expected.append(mill.clock.advance(60))
        move()
        noted.append(mill.build(build.id).updated_at)

    assert noted == expected
