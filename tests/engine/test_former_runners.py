"""A runner that registers anew ends what it began under its former name, and nothing of anybody else."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from runner.attempt import Attempt
from runner.cleaning import Cleaning
from runner.cli import make_agent
from runner.client import Client
from runner.executor.base import Job
from runner.executor.docker import DockerExecutor, open_docker
from runner.journal import Journal, JournalPhase, attempt_dir
from runner.proof import Proof
from runner.settings import Settings
from runner.state_dir import Identity, save_identity
from tests.runner.claims import a_claim
from tests.runner.jobs import begin
from tests.runner.state_folder import a_state_folder

pytestmark = pytest.mark.engine
ADDRESS = "http://coordinator.test"


@pytest.fixture
def state() -> Iterator[Path]:
    with a_state_folder() as folder:
        yield folder


def a_running_step(executor: DockerExecutor, state: Path, runner: str, step: str) -> tuple[Journal, Job]:
    """Its journal says who began it."""
    folder = attempt_dir(state, step, 1)
    journal = Journal.create(folder, a_claim(step_id=step).model_dump(mode="json"), runner=runner)
    (folder / "ws").mkdir()
    (folder / "script.sh").write_text("sleep 300")
    job = Job(runner, step, 1, "build-1", "buildmill/busybox:1", folder, folder / "ws")
    begin(executor, job)
    journal.advance(JournalPhase.RUNNING)
    return journal, job


@pytest.fixture
def registered_anew(state: Path, runner: str, executor: DockerExecutor) -> Iterator[Any]:
    """The agent of a folder whose identity was removed; the executor is that of its former life."""
    save_identity(state, Identity(runner, "the-secret", ADDRESS))
    (state / "identity.json").unlink()
    told = []

    def coordinator(request: httpx.Request) -> httpx.Response:
        told.append(request.content)
        return httpx.Response(201, json={"runnerId": f"{runner}-anew", "runnerSecret": "another-secret"})

    connect = partial(Client, transport=httpx.MockTransport(coordinator))
    agent = make_agent(Settings(coordinator=ADDRESS, state=state, executor="docker"), connect=connect)
    yield agent._means
    agent._means.executor.close()
    agent._means.caches.close()
    agent._means.client.close()


def test_what_runs_under_a_former_name_is_killed_before_it_is_called_dead(
    registered_anew, executor, state, runner
) -> None:
    journal, job = a_running_step(executor, state, runner, "step-1")
    attempt = Attempt(Proof("step-1", 1, "the-lease"))
    attempt.abandon()
    freed = []

    Cleaning(registered_anew, journal, attempt, a_claim(step_id="step-1")).prove(
        free=lambda: freed.append(executor.wait(job, timeout_s=0) is not None)
    )

    assert freed == [True]
    assert "dead" in journal.data
    assert executor.remains(job) == []
    assert executor.leftovers() == []


def test_what_was_left_under_a_former_name_is_found_and_removed(
    registered_anew, executor, state, runner
) -> None:
    a_running_step(executor, state, runner, "step-2")

    [found] = registered_anew.executor.leftovers()
    assert (found.step_id, found.attempt, found.is_running) == ("step-2", 1, True)

    registered_anew.executor.remove_leftover(found)
    assert executor.leftovers() == []


def test_the_steps_of_a_folder_that_was_copied_are_not_the_copys_to_end(
    registered_anew, executor, state, runner, tmp_path
) -> None:
    _, job = a_running_step(executor, state, runner, "step-3")
    copy = open_docker(runner="the-copy", state=tmp_path, environ=os.environ, holders_ahead=0)
    told = Job("the-copy", "step-3", 1, "build-1", job.image, job.attempt_dir, job.workspace)

    copy.kill(told, hard=True)

    assert copy.leftovers() == []
    assert copy.remains(told) == []
    copy.destroy(told)
    copy.close()
    assert executor.wait(job, timeout_s=0) is None
    assert executor._own_holder(job)
