"""Steps in containers whose runner is killed, stopped or cut off, and goes on with them."""

import re
import signal
import time

import docker
import pytest

from tests.factories import a_step
from tests.runner.state_folder import a_state_folder
from tests.trip.lives import deaths_in
from tests.trip.stage import an_engine_stage, said_in, steps_of, until
from tests.trip.test_crashes import LOST_AFTER_S, NUMBERS, Machines, closing, phases_in

pytestmark = pytest.mark.engine

ONCE = ["step.claimed", "step.started", "step.finished"]
PLACES = [
    "after-creating-1",  # nothing is made yet
    "before-running-1",  # the container is made and may start
    "after-running-1",  # it counts as running and is not started
    "before-exited-1",  # the script has ended and nobody wrote that down
    "after-exited-1",
    "after-collecting-1",  # some of its outputs may have been stored
    "after-uploading-1",
    "after-completing-1",
    "before-done-1",  # the outcome was told and nobody wrote that down
]


@pytest.fixture
def engine():
    api = docker.APIClient(version="auto")
    yield api
    api.close()


def containers_of(engine, step_id):
    return engine.containers(all=True, filters={"label": f"buildmill.step={step_id}"})


def test_a_runner_killed_around_the_lines_of_its_journal_runs_no_container_twice(engine):
    with an_engine_stage() as stage:
        deaths = stage.folder / "deaths"
        mark = "echo x >> /cache/$BUILDMILL_STEP; wc -l < /cache/$BUILDMILL_STEP; echo y > out"
        spec = [
            a_step(
                place, PLACES[number - 1 : number], runScript=mark, outputPaths=["out"], cacheDirs=["/cache"]
            )
            for number, place in enumerate(PLACES)
        ]
        build = stage.submit(spec)

        runner = stage.a_runner_with_many_lives(deaths, executor="docker")
        build = stage.await_end(build["id"], 100)

        assert build["status"] == "SUCCESS", stage.tell(build["id"]) + runner.output[-2000:]
        # the last death comes when the build has ended
        until(lambda: [death.place for death in deaths_in(deaths)] == PLACES, 20, told=lambda: runner.output)
        until(lambda: len(stage.gate.times_of("resume")) > len(PLACES), 20)
        resumed = stage.gate.times_of("resume")
        for death in deaths_in(deaths):
            assert any(0 < came - death.at < 10 for came in resumed), death
        for name, step in steps_of(build).items():
            assert said_in(stage.log(step["id"])) == b"1\n", name
            assert stage.transitions(step["id"]) == ONCE, name
            until(lambda step=step: not containers_of(engine, step["id"]), 20)


def test_a_container_its_log_and_its_outcome_outlast_a_coordinator_and_a_runner_that_are_killed(engine):
    """The container ends while there is nobody to be told, and the outage is longer than silence may last."""
    with a_state_folder() as folder, closing(machines := Machines(folder, executor="docker")):
        user = machines.user
        user.an_image("box", "buildmill/busybox:1")
        talk = "for n in $(seq 0 299); do echo $n; sleep 0.01; done; echo x > out"
        build = user.submit([a_step("a", runScript=talk, outputPaths=["out"])])
        step_id = build["steps"][0]["id"]
        user.await_log(step_id, b"\n50\n")

        machines.coordinator.kill()
        outage = time.monotonic()
        until(lambda: "uploading" in phases_in(folder / "r"), told=lambda: machines.runner.output)
        machines.runner.kill()
        machines.start_runner()
        until(lambda: time.monotonic() - outage > LOST_AFTER_S + 1)
        machines.start_coordinator()
        build = user.await_end(build["id"])

        assert build["status"] == "SUCCESS", user.tell(build["id"])
        assert said_in(user.log(step_id)) == NUMBERS.encode()
        assert build["steps"][0]["attempts"][0]["logState"] == "complete"
        assert user.transitions(step_id) == ONCE
        assert set(user.artifacts(build["id"])) == {"out"}
        until(lambda: not containers_of(engine, step_id), 20)


def test_a_runner_that_was_stopped_past_its_lease_kills_its_container_and_changes_nothing(engine):
    with an_engine_stage(lost_after=3.0, amnesty=0.0) as stage:
        script = 'echo attempt $BUILDMILL_ATTEMPT; test "$BUILDMILL_ATTEMPT" = 2 && sleep 6 || sleep 600'
        zombie = stage.a_runner_process("--slots", "1", machine="one", executor="docker")
        build = stage.submit([a_step("a", runScript=script)])
        step_id = build["steps"][0]["id"]
        stage.await_log(step_id, b"attempt 1")
        (container,) = containers_of(engine, step_id)

        zombie.send(signal.SIGSTOP)
        stage.a_runner("two", executor="docker")
        stage.await_log(step_id, b"attempt 2", 40)
        zombie.send(signal.SIGCONT)
        until(lambda: not engine.containers(all=True, filters={"id": container["Id"]}), 15)
        build = stage.await_end(build["id"])

        step = build["steps"][0]
        assert (build["status"], step["attempt"]) == ("SUCCESS", 2), stage.tell(build["id"])
        assert [found["outcome"] for found in step["attempts"]] == ["lost", "succeeded"]
        assert said_in(stage.log(step_id)) == b"attempt 2\n"


def test_containers_that_an_operator_removes_are_named_and_run_again_and_three_pause_their_runner(engine):
    names = ["a", "b", "c"]
    with an_engine_stage() as stage:
        stage.a_runner("r", executor="docker", slots=len(names))
        build = stage.submit([a_step(name, runScript="echo begun; sleep 600") for name in names])
        for step in build["steps"]:
            stage.await_log(step["id"], b"begun")

        for step in build["steps"]:
            (container,) = containers_of(engine, step["id"])
            engine.remove_container(container["Id"], force=True)
        for name in names:
            stage.await_step(build["id"], name, "PENDING")

        for step in stage.api.build(build["id"])["steps"]:
            assert [found["reason"] for found in step["attempts"]] == ["container_vanished"]
        (runner,) = until(lambda: [one for one in stage.api.get("/api/runners") if one.get("pausedUntil")])
        assert runner["pauseReason"] == (
            "3 steps in a row failed because of this machine, the last one: container_vanished"
        )
        told = stage.api.client.get("/metrics").text
        assert 'buildmill_runners{condition="paused"} 1\n' in told
        (pause_s,) = re.findall(r"(?m)^buildmill_runner_paused_seconds{.*} (\d+)", told)
        assert 40 < int(pause_s) <= 60
        stage.cancel(build["id"])
        other = stage.submit([a_step("other")])
        time.sleep(1.5)  # several heartbeats, and long enough for an idle runner to take it
        (step,) = stage.api.build(other["id"])["steps"]
        assert step["status"] == "PENDING"
        assert "step.started" not in stage.transitions(
            step["id"]
        )  # an open poll may have had to give it back


def test_a_container_goes_on_while_one_version_takes_over_from_the_other(engine):
    with an_engine_stage() as stage:
        talk = "i=0; while [ $i -lt 150 ]; do echo $i; i=$((i+1)); sleep 0.02; done; echo x > out"
        build = stage.submit([a_step("a", runScript=talk, outputPaths=["out"])])
        step_id = build["steps"][0]["id"]
        first = stage.a_runner_process(executor="docker")
        stage.await_log(step_id, b"\n10\n")
        (container,) = containers_of(engine, step_id)

        second = stage.a_runner_process("--handover", executor="docker")
        assert first.wait() == 0, second.output
        left = time.monotonic()
        until(lambda: "attempt_adopted" in second.output, told=lambda: second.output)
        assert time.monotonic() - left < 10
        build = stage.await_end(build["id"])

        assert build["status"] == "SUCCESS", stage.tell(build["id"])
        assert said_in(stage.log(step_id)) == "".join(f"{n}\n" for n in range(150)).encode()
        assert stage.transitions(step_id) == ONCE
        assert container["Id"] not in [found["Id"] for found in containers_of(engine, step_id)]
