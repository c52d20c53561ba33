"""Steps in containers whose runner is told to leave: by a signal, by a second one, and by a command."""

import signal

import docker
import pytest

from tests.factories import a_step
from tests.trip.stage import Process, an_engine_stage, said_in, until

pytestmark = pytest.mark.engine

ONCE = ["step.claimed", "step.started", "step.finished"]
# It ends when it finds the file that a test puts into its container.
WAITS = "echo begun; until test -e /go; do sleep 0.1; done; echo ended; echo x > out"


@pytest.fixture
def engine():
    api = docker.APIClient(version="auto")
    yield api
    api.close()


def containers_of(engine, step_id):
    return engine.containers(all=True, filters={"label": f"buildmill.step={step_id}"})


def say_go(engine, step_id):
    (container,) = containers_of(engine, step_id)
    engine.exec_start(engine.exec_create(container["Id"], ["touch", "/go"])["Id"])


def await_draining(stage):
    until(lambda: stage.api.get("/api/runners")[0]["draining"])


def assert_ran_once_and_whole(stage, build):
    step = build["steps"][0]
    assert (build["status"], step["attempt"]) == ("SUCCESS", 1), stage.tell(build["id"])
    assert said_in(stage.log(step["id"])) == b"begun\nended\n"
    assert set(stage.artifacts(build["id"])) == {"out"}
    assert stage.transitions(step["id"]) == ONCE


def test_the_first_term_lets_a_container_finish_and_takes_no_other(engine):
    with an_engine_stage() as stage:
        build = stage.submit([a_step("a", runScript=WAITS, outputPaths=["out"])])
        step_id = build["steps"][0]["id"]
        runner = stage.a_runner_process("--slots", "2", executor="docker")
        stage.await_log(step_id, b"begun")

        runner.send(signal.SIGTERM)
        await_draining(stage)
        other = stage.submit([a_step("other")])
        say_go(engine, step_id)

        assert runner.wait() == 0, runner.output
        assert_ran_once_and_whole(stage, stage.api.build(build["id"]))
        assert stage.api.build(other["id"])["status"] == "PENDING", runner.output
        assert stage.transitions(other["steps"][0]["id"]) == []
        assert containers_of(engine, step_id) == []


def test_the_second_term_ends_a_container_and_another_runner_runs_its_step(engine):
    with an_engine_stage() as stage:
        script = 'echo attempt $BUILDMILL_ATTEMPT; test "$BUILDMILL_ATTEMPT" = 2 || sleep 600'
        build = stage.submit([a_step("a", runScript=script, graceSeconds=1)])
        step_id = build["steps"][0]["id"]
        runner = stage.a_runner_process(executor="docker")
        stage.await_log(step_id, b"attempt 1")
        (container,) = containers_of(engine, step_id)

        runner.send(signal.SIGTERM)
        await_draining(stage)
        assert engine.inspect_container(container["Id"])["State"]["Running"]
        stage.a_runner("other", executor="docker")
        runner.send(signal.SIGTERM)
        build = stage.await_end(build["id"])

        step = build["steps"][0]
        assert (build["status"], step["attempt"]) == ("SUCCESS", 2), stage.tell(build["id"])
        first = step["attempts"][0]
        assert (first["outcome"], first["reason"]) == ("failed", "runner_shutdown")
        assert said_in(stage.log(step_id)) == b"attempt 2\n"
        assert runner.wait() == 0, runner.output
        until(lambda: not containers_of(engine, step_id), 15)


def test_drain_by_command_lets_a_container_finish_and_comes_back_with_it(engine):
    with an_engine_stage() as stage:
        build = stage.submit([a_step("a", runScript=WAITS, outputPaths=["out"])])
        step_id = build["steps"][0]["id"]
        runner = stage.a_runner_process("--slots", "2", executor="docker")
        stage.await_log(step_id, b"begun")

        drain = Process(stage.folder, "runner", "drain", "--wait", "--state", str(stage.folder / "r"))
        until(lambda: "draining: 1 step running" in drain.output, told=lambda: drain.output)
        await_draining(stage)
        other = stage.submit([a_step("other")])
        say_go(engine, step_id)

        assert runner.wait() == 0, runner.output
        assert drain.wait() == 0, drain.output
        assert "drained: the runner has ended" in drain.output
        assert_ran_once_and_whole(stage, stage.api.build(build["id"]))
        assert stage.api.build(other["id"])["status"] == "PENDING", runner.output
        assert containers_of(engine, step_id) == []
