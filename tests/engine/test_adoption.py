"""A runner that is killed leaves its containers running, and its successor goes on with them."""

import time

import docker
import pytest

from tests.factories import a_step
from tests.trip.stage import an_engine_stage, said_in, steps_of, until

pytestmark = pytest.mark.engine

ONCE = ["step.claimed", "step.started", "step.finished"]


@pytest.fixture(scope="module")
def stage():
    with an_engine_stage() as stage:
        yield stage


@pytest.fixture
def engine():
    api = docker.APIClient(version="auto")
    yield api
    api.close()


@pytest.fixture
def start_runner(stage):
    """Starts runner processes on one folder; the last one is stopped after the test."""
    started = []

    def start():
        started.append(stage.a_runner_process(executor="docker"))
        return started[-1]

    yield start
    for process in started:
        process.close()


def the_container_of(engine, step_id):
    (found,) = engine.containers(all=True, filters={"label": f"buildmill.step={step_id}"})
    return found["Id"]


def test_a_container_outlives_its_runner_and_is_adopted(stage, engine, start_runner):
    script = "i=0; while [ $i -lt 400 ]; do echo $i; i=$((i+1)); sleep 0.02; done; echo x > out"
    build = stage.submit([a_step("a", runScript=script, outputPaths=["out"]), a_step("b", ["a"])])
    step_id = steps_of(build)["a"]["id"]
    runner = start_runner()
    stage.await_log(step_id, b"\n50\n")
    container = the_container_of(engine, step_id)

    runner.kill()
    before = len(stage.log(step_id))
    assert engine.inspect_container(container)["State"]["Running"]
    runner = start_runner()
    restarted = time.monotonic()
    until(lambda: len(stage.log(step_id)) > before, 20)
    adopted_after = time.monotonic() - restarted
    runner.kill()  # once more, for one that was adopted itself
    start_runner()
    build = stage.await_end(build["id"])

    steps = steps_of(build)
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert said_in(stage.log(step_id)) == "".join(f"{n}\n" for n in range(400)).encode()
    assert [stage.transitions(step["id"]) for step in steps.values()] == [ONCE, ONCE]
    assert adopted_after < 10


def test_a_container_that_ended_while_no_runner_watched_is_told_as_it_ended(stage, engine, start_runner):
    go = "while ! test -e /root/cache/go; do sleep 0.05; done"
    build = stage.submit(
        [a_step("a", runScript=f"echo begun; {go}; echo ended; exit 37", cacheDirs=["/root/cache"])]
    )
    step_id = build["steps"][0]["id"]
    runner = start_runner()
    stage.await_log(step_id, b"begun")
    container = the_container_of(engine, step_id)
    mounts = {
        found["Destination"]: found["Source"] for found in engine.inspect_container(container)["Mounts"]
    }

    runner.kill()
    with open(f"{mounts['/root/cache']}/go", "w"):
        pass
    assert engine.wait(container, timeout=30)["StatusCode"] == 37
    start_runner()
    build = stage.await_end(build["id"])

    step = build["steps"][0]
    assert (step["reason"], step["exitCode"], step["attempt"]) == ("exit_nonzero", 37, 1)
    assert said_in(stage.log(step_id)) == b"begun\nended\n"
    assert stage.transitions(step_id) == ONCE


def test_a_cancel_while_no_runner_watched_ends_the_container(stage, engine, start_runner):
    build = stage.submit([a_step("a", runScript="echo begun; sleep 600")])
    step_id = build["steps"][0]["id"]
    runner = start_runner()
    stage.await_log(step_id, b"begun")
    container = the_container_of(engine, step_id)

    runner.kill()
    stage.cancel(build["id"])
    start_runner()
    build = stage.await_end(build["id"])

    assert build["steps"][0]["status"] == "CANCELLED"
    until(lambda: not engine.containers(all=True, filters={"id": container}), 20)


def test_a_container_that_was_removed_while_no_runner_watched_is_run_anew(stage, engine, start_runner):
    build = stage.submit([a_step("a", runScript='echo begun; test "$BUILDMILL_ATTEMPT" = 2 || sleep 600')])
    step_id = build["steps"][0]["id"]
    runner = start_runner()
    stage.await_log(step_id, b"begun")

    runner.kill()
    engine.remove_container(the_container_of(engine, step_id), force=True)
    start_runner()
    build = stage.await_end(build["id"])  # after the ten seconds that a broken machine gets

    step = build["steps"][0]
    assert (build["status"], step["attempt"]) == ("SUCCESS", 2)
    assert step["attempts"][0]["reason"] == "container_vanished"
