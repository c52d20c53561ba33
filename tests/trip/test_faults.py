"""Builds over a network that loses answers, sends things twice, and goes away for a while."""

from pathlib import Path

import pytest

from tests.factories import ON_SQLITE, a_step
from tests.trip.faults import Wire
from tests.trip.stage import a_stage, said_in, steps_of, until

ONCE = ["step.claimed", "step.started", "step.finished"]
VERBS = ("resume", "acquire", "source", "start", "log", "heartbeat", "head_blob", "put_blob", "complete")
LINES = "".join(f"{number}\n" for number in range(2000))


def a_telling_spec(folder):
    """Two steps that use every request there is, and write down that they ran."""
    return [
        a_step(
            "a",
            runScript=f"echo a >> {folder}/ran; cat {folder}/lines; cp {folder}/lines out",
            outputPaths=["out"],
        ),
        a_step("b", ["a"], runScript=f"echo b >> {folder}/ran; cat out"),
    ]


def assert_ran_once_and_whole(stage, build):
    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert (stage.folder / "ran").read_text() == "a\nb\n"
    for step in build["steps"]:
        assert step["attempt"] == 1
        assert stage.transitions(step["id"]) == ONCE
        assert said_in(stage.log(step["id"])) == LINES.encode()


@pytest.fixture
def submitted(stage):
    """A build that waits for its runner: the first poll already gets a step."""
    (stage.folder / "lines").write_text(LINES)
    repository = stage.a_repository()
    repository.commit({"file": "content"})
    return stage.submit(a_telling_spec(stage.folder), repoUrl=repository.url, branch="main")


@pytest.mark.threat("I07")
def test_every_kind_of_answer_may_be_lost(stage, submitted):
    wire = Wire(lose=dict.fromkeys(VERBS, 1))

    stage.a_runner(wire=wire)
    build = stage.await_end(submitted["id"])

    assert_ran_once_and_whole(stage, build)
    assert [verb for verb in VERBS if wire.lose_answers[verb]] == [], "never asked"


@pytest.mark.threat("I03")
def test_every_request_may_arrive_twice(stage, submitted):
    wire = Wire(repeat=dict.fromkeys(VERBS, 1000))

    stage.a_runner(wire=wire)
    build = stage.await_end(submitted["id"])

    assert_ran_once_and_whole(stage, build)


def test_a_step_goes_on_while_the_coordinator_cannot_be_reached(stage):
    go = stage.folder / "go"
    runner = stage.a_runner()
    build = stage.submit(
        [
            a_step(
                "a",
                runScript=f"echo begun; while ! test -e {go}; do sleep 0.02; done; echo x > out; echo over",
                outputPaths=["out"],
            ),
            a_step("b", ["a"], runScript="cat out"),
        ]
    )
    step_id = steps_of(build)["a"]["id"]
    stage.await_log(step_id, b"begun")

    runner.wire.is_unplugged = True
    until(lambda: runner.wire.failed["heartbeat"] > 1)
    go.touch()  # it ends, is collected and waits to be told
    until(lambda: runner.wire.failed["head_blob"] > 0)
    assert steps_of(stage.api.build(build["id"]))["a"]["status"] == "RUNNING"
    runner.wire.is_unplugged = False
    build = stage.await_end(build["id"])

    assert build["status"] == "SUCCESS", stage.tell(build["id"])
    assert said_in(stage.log(step_id)) == b"begun\nover\n"
    assert [stage.transitions(step["id"]) for step in build["steps"]] == [ONCE, ONCE]


@ON_SQLITE
def test_a_cancel_reaches_a_runner_that_could_not_be_reached_for_a_while(stage):
    runner = stage.a_runner()
    build = stage.submit([a_step("a", runScript="echo begun; sleep 600")])
    stage.await_log(build["steps"][0]["id"], b"begun")

    runner.wire.is_unplugged = True
    stage.cancel(build["id"])
    until(lambda: runner.wire.failed["heartbeat"] > 0)
    assert stage.api.build(build["id"])["steps"][0]["status"] == "RUNNING"
    runner.wire.is_unplugged = False
    build = stage.await_end(build["id"], 15)

    assert build["steps"][0]["status"] == "CANCELLED"


@ON_SQLITE
@pytest.mark.threat("I04")
def test_a_runner_that_was_given_up_changes_nothing_when_it_returns(database):
    with a_stage(database, lost_after=3.0, amnesty=0.0) as stage:
        record, go = stage.folder / "ran", stage.folder / "go"
        script = (
            f"echo $$ >> {record}; echo attempt $BUILDMILL_ATTEMPT; "
            f"while ! test -e {go}; do sleep 0.05; done; echo x > out"
        )
        one = stage.a_runner("one", slots=1)
        build = stage.submit([a_step("a", runScript=script, outputPaths=["out"])])
        step_id = build["steps"][0]["id"]
        stage.await_log(step_id, b"attempt 1")

        one.wire.is_unplugged = True
        stage.a_runner("two")
        stage.await_log(step_id, b"attempt 2", 40)
        one.wire.is_unplugged = False
        until(lambda: not attempts_of(one), 15)  # it has heard that this is no longer its step
        first, second = (int(pid) for pid in record.read_text().split())
        assert not is_alive(first)
        assert is_alive(second)
        go.touch()
        build = stage.await_end(build["id"])

        step = build["steps"][0]
        assert (build["status"], step["attempt"]) == ("SUCCESS", 2)
        assert said_in(stage.log(step_id)) == b"attempt 2\n"
        said, gap, _ = stage.log(step_id, attempt=1).partition(
            b"\n[buildmill] error: bytes may be missing here"
        )
        assert said_in(said + b"##[buildmill:end 0 ") == b"attempt 1\n"
        assert gap
        assert [found["outcome"] for found in step["attempts"]] == ["lost", "succeeded"]


@ON_SQLITE
@pytest.mark.threat("I04")
def test_a_runner_that_was_given_up_goes_on_when_nobody_else_took_its_step(database):
    with a_stage(database, lost_after=3.0, amnesty=0.0) as stage:
        go = stage.folder / "go"
        runner = stage.a_runner()
        build = stage.submit([a_step("a", runScript=f"echo begun; until test -e {go}; do sleep 0.02; done")])
        step_id = build["steps"][0]["id"]
        stage.await_log(step_id, b"begun")

        runner.wire.is_unplugged = True
        stage.await_step(build["id"], "a", "PENDING")
        runner.wire.is_unplugged = False
        stage.await_step(build["id"], "a", "RUNNING")
        go.touch()
        build = stage.await_end(build["id"])

        assert (build["status"], build["steps"][0]["attempt"]) == ("SUCCESS", 1)


def attempts_of(runner) -> list[Path]:
    return list((runner.state / "a").glob("*/*/journal.json"))


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
