"""An engine that is away for a while, and an image that another runner removed, fail no step."""
# ruff: noqa: F811 - fixtures are imported by their names

import time

import pytest

from runner import step_run
from runner.errors import EngineUnavailable, ImageGone
from shared.protocol import Limits
from tests.runner.test_step_run import attempt, coordinator, means, run, wishes  # noqa: F401


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(step_run, "ENGINE_PAUSE_S", 0.05)


@pytest.fixture
def engine_away(means, monkeypatch):
    """The engine answers no pull until it was asked so often."""
    pull, asked = means.executor.pull, []

    def begin(times):
        def answer(image, *, deadline_s, progress):
            asked.append(deadline_s)
            if len(asked) <= times:
                raise EngineUnavailable("the container engine does not answer")
            return pull(image, deadline_s=deadline_s, progress=progress)

        monkeypatch.setattr(means.executor, "pull", answer)
        return asked

    return begin


def test_an_engine_that_restarts_during_a_pull_fails_no_step(run, coordinator, engine_away):
    asked = engine_away(3)

    run()

    assert [said["status"] for said in coordinator.completions] == ["success"]
    assert len(asked) == 4
    assert asked == sorted(asked, reverse=True)  # of one deadline


def test_an_engine_that_stays_away_ends_the_pull_at_its_deadline_as_the_engines_fault(
    run, coordinator, engine_away
):
    engine_away(10**9)
    began = time.monotonic()

    run(limits=Limits(timeout_s=60, pull_timeout_s=1))

    (said,) = coordinator.completions
    assert (said["reason"], said["infra"]) == ("daemon_error", True)
    assert 1 <= time.monotonic() - began < 10


def test_who_waits_for_the_engine_hears_that_the_build_was_cancelled(run, coordinator, attempt, engine_away):
    engine_away(10**9)
    attempt.cancel("cancelled")
    began = time.monotonic()

    run()

    assert [said["reason"] for said in coordinator.completions] == ["cancelled"]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("times", "status", "pulls"), [(1, "success", 2), (2, "failed", 2)])
def test_an_image_that_was_removed_while_the_step_was_prepared_is_pulled_once_more(
    run, coordinator, means, monkeypatch, engine_away, times, status, pulls
):
    create, refused = means.executor.create, []

    def refuse(job):
        if len(refused) < times:
            refused.append(job)
            raise ImageGone(job.image)
        return create(job)

    monkeypatch.setattr(means.executor, "create", refuse)
    asked = engine_away(0)

    run()

    (said,) = coordinator.completions
    assert said["status"] == status
    assert said.get("reason") in (None, "daemon_error")
    assert len(asked) == pulls
