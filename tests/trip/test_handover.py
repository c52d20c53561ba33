"""What a runner does that is told to stop, by signals and by commands, and what its successor finds."""

import signal
import time
from pathlib import Path

from tests.factories import ON_SQLITE, a_step
from tests.trip.stage import Process, said_in, until

ONCE = ["step.claimed", "step.started", "step.finished"]
NUMBERS = "".join(f"{number}\n" for number in range(200))


@ON_SQLITE
def test_the_first_term_lets_a_step_finish_and_takes_no_other(stage):
    go = stage.folder / "go"
    build = stage.submit([a_step("a", runScript=f"echo begun; until test -e {go}; do sleep 0.02; done")])
    runner = stage.a_runner_process("--slots", "2")
    stage.await_log(build["steps"][0]["id"], b"begun")

    runner.send(signal.SIGTERM)
    until(lambda: stage.api.get("/api/runners")[0]["draining"])
    other = stage.submit([a_step("other")])
    go.touch()

    assert runner.wait() == 0, runner.output
    assert stage.api.build(build["id"])["status"] == "SUCCESS"
    assert stage.api.build(other["id"])["status"] == "PENDING", (
        runner.output
        + str(stage.api.get("/api/audit-logs")["auditLogs"][:8])
        + str(stage.api.build(other["id"]))
    )


@ON_SQLITE
def test_the_second_term_ends_a_step_and_another_runner_takes_it_at_once(stage):
    pid = stage.folder / "pid"
    script = (
        f'echo attempt $BUILDMILL_ATTEMPT; test "$BUILDMILL_ATTEMPT" = 2 || {{ echo $$ > {pid}; sleep 600; }}'
    )
    build = stage.submit([a_step("a", runScript=script)])
    runner = stage.a_runner_process()
    step_id = build["steps"][0]["id"]
    stage.await_log(step_id, b"attempt 1")

    runner.send(signal.SIGTERM)
    until(lambda: stage.api.get("/api/runners")[0]["draining"])
    other = stage.a_runner("other")
    runner.send(signal.SIGTERM)
    told = time.monotonic()
    build = stage.await_end(build["id"])

    step = build["steps"][0]
    assert time.monotonic() - told < 8, "the delay of other failures of machines is longer"
    assert (build["status"], step["attempt"]) == ("SUCCESS", 2)
    assert (step["attempts"][0]["outcome"], step["attempts"][0]["reason"]) == ("failed", "runner_shutdown")
    assert runner.wait() == 0, runner.output
    assert not Path(f"/proc/{pid.read_text().strip()}").exists()
    until(lambda: other.agent.standing().running == ())


def a_command(stage, *words: str) -> Process:
    return Process(stage.folder, "runner", *words, "--state", str(stage.folder / "r"))


@ON_SQLITE
def test_drain_by_command_lets_a_step_finish_and_tells_meanwhile(stage):
    go = stage.folder / "go"
    build = stage.submit([a_step("a", runScript=f"echo begun; until test -e {go}; do sleep 0.02; done")])
    runner = stage.a_runner_process()
    stage.await_log(build["steps"][0]["id"], b"begun")

    drain = a_command(stage, "drain", "--wait")
    until(lambda: "draining: 1 step running" in drain.output)
    until(lambda: stage.api.get("/api/runners")[0]["draining"])
    go.touch()

    assert runner.wait() == 0, runner.output
    assert drain.wait() == 0
    assert "drained: the runner has ended" in drain.output
    assert stage.api.build(build["id"])["status"] == "SUCCESS"


@ON_SQLITE
def test_one_version_after_the_other_takes_over_a_step_that_never_notices(stage):
    script = (
        f"echo x >> {stage.folder}/ran; for n in $(seq 0 199); do echo $n; sleep 0.03; done; echo x > out"
    )
    build = stage.submit([a_step("a", runScript=script, outputPaths=["out"])])
    step_id = build["steps"][0]["id"]
    first = stage.a_runner_process()
    stage.await_log(step_id, b"\n10\n")

    second = stage.a_runner_process("--handover")
    assert first.wait() == 0, second.output
    until(lambda: "attempt_adopted" in second.output)
    stage.a_runner_process("--handover")
    assert second.wait() == 0
    second_left = time.monotonic()
    build = stage.await_end(build["id"])

    assert (build["status"], build["steps"][0]["attempt"]) == ("SUCCESS", 1), stage.tell(build["id"])
    assert "handed over: 1 step running" in second.output
    assert said_in(stage.log(step_id)) == NUMBERS.encode()
    assert (stage.folder / "ran").read_text() == "x\n"
    assert stage.transitions(step_id) == ONCE
    assert stage.gate.times_of("resume")[-1] - second_left < 10


@ON_SQLITE
def test_a_time_limit_goes_on_through_a_handover(stage):
    build = stage.submit([a_step("a", runScript="echo begun; sleep 600", timeoutSeconds=6)])
    step_id = build["steps"][0]["id"]
    stage.a_runner_process()
    stage.await_log(step_id, b"begun")
    begun = time.monotonic()

    handover = a_command(stage, "handover")
    assert handover.wait() == 0, handover.output
    stage.a_runner_process()
    build = stage.await_end(build["id"])

    assert build["steps"][0]["reason"] == "timeout"
    assert time.monotonic() - begun < 6 + 4, "it did not begin anew"


@ON_SQLITE
def test_a_runner_that_hands_over_leaves_its_steps_to_the_next(stage):
    go = stage.folder / "go"
    script = f"echo begun; until test -e {go}; do sleep 0.02; done; echo ended; echo x >> {stage.folder}/ran"
    build = stage.submit([a_step("a", runScript=script)])
    runner = stage.a_runner_process()
    step_id = build["steps"][0]["id"]
    stage.await_log(step_id, b"begun")

    runner.send(signal.SIGUSR2)
    assert runner.wait() == 0
    assert stage.api.build(build["id"])["steps"][0]["status"] == "RUNNING"
    stage.a_runner_process()
    go.touch()
    build = stage.await_end(build["id"])

    assert (build["status"], build["steps"][0]["attempt"]) == ("SUCCESS", 1)
    assert said_in(stage.log(step_id)) == b"begun\nended\n"
    assert (stage.folder / "ran").read_text() == "x\n"


@ON_SQLITE
def test_once_ends_with_nothing_left_to_do(stage):
    build = stage.submit([a_step("a"), a_step("b", ["a"])])

    runner = stage.a_runner_process("--once")

    assert runner.wait() == 0, runner.output
    assert stage.api.build(build["id"])["status"] == "SUCCESS"
