"""A cancel is proved: wherever it meets a step, it ends, and a receipt says when and that nothing is left."""

import os
import time
from datetime import datetime

import httpx
import pytest

from runner.mounts import mounts_below
from tests.factories import ON_SQLITE, a_step
from tests.trip.faults import Wire
from tests.trip.stage import a_stage, steps_of, until

TALKING = "trap 'sleep 1; echo goodbye; exit 9' TERM; echo begun; while :; do sleep 0.05; done"


def cancel(stage, build_id):
    """Ask for the end of a build; the id of the receipt."""
    answer = httpx.post(f"{stage.address}/api/builds/{build_id}/cancel", timeout=30)
    assert answer.is_success, answer.text
    return answer.json()["cancelId"]


def await_receipt(stage, cancel_id, timeout_s=30):
    """The receipt, when it says that all of it is confirmed."""

    def confirmed():
        receipt = stage.api.get(f"/api/cancels/{cancel_id}")
        return receipt if receipt["confirmed"] else None

    return until(confirmed, timeout_s, told=lambda: stage.api.get(f"/api/cancels/{cancel_id}"))


def assert_nothing_left(stage, receipt, machine="r"):
    state = stage.folder / machine
    assert receipt["state"] == "done"
    assert all(step["leftovers"] == [] for step in receipt["steps"])
    assert mounts_below(state / "a") == []
    assert os.listdir(state / "processes") == []
    # the journal stays until the runner has heard that its proof has arrived
    assert {path.name for path in (state / "a").glob("*/*/*")} <= {"journal.json"}
    until(lambda: [path for path in (state / "a").glob("*/*") if path.exists()] == [], 10)


@pytest.mark.threat("I16")
def test_the_receipt_of_a_cancel_says_when_each_step_was_told_dead_and_gone(stage):
    stage.a_runner()
    build = stage.submit([a_step("a", runScript=TALKING), a_step("b", ["a"])])
    step_id = steps_of(build)["a"]["id"]
    stage.await_log(step_id, b"begun")

    receipt = await_receipt(stage, cancel(stage, build["id"]))

    (step,) = [step for step in receipt["steps"] if step["name"] == "a"]
    assert step["requestedAt"] <= step["termAt"] < step["deadAt"] <= step["cleanedAt"]
    assert_nothing_left(stage, receipt)
    assert b"goodbye\n" in stage.log(step_id)


@ON_SQLITE
@pytest.mark.parametrize("ears", ["open", "deaf"])
def test_a_silent_step_hears_of_a_cancel_at_once_and_at_the_latest_with_a_heartbeat(database, ears):
    with a_stage(database, heartbeat=4.0) as stage:
        if ears == "deaf":
            stage.gate.hold_before("events")
        stage.a_runner(slots=1)
        build = stage.submit([a_step("a", runScript="echo begun; sleep 600")])
        stage.await_log(build["steps"][0]["id"], b"begun")
        time.sleep(1.0)  # what it has printed is delivered, and so it speaks no more

        receipt = await_receipt(stage, cancel(stage, build["id"]))

        (step,) = receipt["steps"]
        asked, heard = (datetime.fromisoformat(step[name]) for name in ("requestedAt", "termAt"))
        assert (heard - asked).total_seconds() < (1.5 if ears == "open" else 6)
        assert_nothing_left(stage, receipt)


@ON_SQLITE
@pytest.mark.parametrize("verb", ["start", "head_blob", "put_blob", "complete"])
def test_a_cancel_meets_a_step_at_each_of_its_requests(stage, verb):
    """The request waits at the coordinator's door while the build is cancelled, and then has its effect."""
    stage.a_runner()
    arrived = stage.gate.hold_before(verb)
    build = stage.submit([a_step("a", runScript="seq 1 100000 > out", outputPaths=["out"])])
    assert arrived.wait(20)

    cancel_id = cancel(stage, build["id"])
    stage.gate.open()
    build = stage.await_end(build["id"], 15)

    assert build["steps"][0]["status"] == "CANCELLED"
    assert stage.artifacts(build["id"]) == {}
    assert_nothing_left(stage, await_receipt(stage, cancel_id))


@ON_SQLITE
def test_a_runner_killed_between_term_and_the_proof_proves_it_in_its_next_life(stage):
    runner = stage.a_runner_process()
    # it needs three seconds of its ten, and the runner dies in the first
    script = (
        f"trap 'touch {stage.folder}/term; sleep 3; echo saved; exit 9' TERM; echo begun; "
        "while :; do sleep 0.05; done"
    )
    build = stage.submit([a_step("a", runScript=script)])
    step_id = build["steps"][0]["id"]
    stage.await_log(step_id, b"begun")

    cancel_id = cancel(stage, build["id"])
    until((stage.folder / "term").exists)
    runner.kill()
    stage.a_runner_process()
    receipt = await_receipt(stage, cancel_id)

    (step,) = receipt["steps"]
    assert stage.api.build(build["id"])["steps"][0]["status"] == "CANCELLED"
    assert step["termAt"] < step["deadAt"] <= step["cleanedAt"]
    assert b"saved\n" in stage.log(step_id)
    assert_nothing_left(stage, receipt)


@ON_SQLITE
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_runner_killed_at_its_proof_tells_it_again(stage, when):
    runner = stage.a_runner_process()
    hold = stage.gate.hold_before if when == "before" else stage.gate.hold_after
    arrived = hold("cleaned")
    build = stage.submit([a_step("a", runScript="echo begun; sleep 60")])
    stage.await_log(build["steps"][0]["id"], b"begun")

    cancel_id = cancel(stage, build["id"])
    assert arrived.wait(20)
    runner.kill()
    stage.gate.open()
    stage.a_runner_process()
    receipt = await_receipt(stage, cancel_id)

    until(lambda: list((stage.folder / "r" / "a").glob("*/*")) == [], 10)
    assert_nothing_left(stage, receipt)


@ON_SQLITE
def test_answers_to_the_proof_may_be_lost_and_it_may_arrive_twice(stage):
    wire = Wire(lose={"cleaned": 2}, repeat={"cleaned": 5})
    stage.a_runner(wire=wire)
    build = stage.submit([a_step("a", runScript="echo begun; sleep 60")])
    stage.await_log(build["steps"][0]["id"], b"begun")

    receipt = await_receipt(stage, cancel(stage, build["id"]))

    until(lambda: list((stage.folder / "r" / "a").glob("*/*")) == [], 20)
    assert wire.sent["cleaned"] == 3
    assert_nothing_left(stage, receipt)


@ON_SQLITE
@pytest.mark.threat("I16")
def test_a_runner_that_was_silent_during_the_cancel_proves_it_when_it_is_back(database):
    with a_stage(database) as stage:
        runner = stage.a_runner()
        build = stage.submit([a_step("a", runScript="echo begun; sleep 600")])
        stage.await_log(build["steps"][0]["id"], b"begun")

        runner.wire.is_unplugged = True
        cancel_id = cancel(stage, build["id"])
        build = stage.await_end(build["id"], 40)  # it ends without the runner
        assert build["steps"][0]["status"] == "CANCELLED"
        assert not stage.api.get(f"/api/cancels/{cancel_id}")["confirmed"]
        runner.wire.is_unplugged = False
        receipt = await_receipt(stage, cancel_id)

        assert_nothing_left(stage, receipt)


@ON_SQLITE
def test_a_slot_is_free_while_the_proof_waits_for_the_coordinator(stage):
    stage.a_runner(slots=1)
    stage.gate.hold_before("cleaned")
    build = stage.submit([a_step("a", runScript="echo begun; sleep 60")])
    stage.await_log(build["steps"][0]["id"], b"begun")
    stage.cancel(build["id"])
    stage.await_end(build["id"])

    began = time.monotonic()
    after = stage.run([a_step("b", runScript="echo hello")])

    assert after["status"] == "SUCCESS"
    assert time.monotonic() - began < 15


@ON_SQLITE
def test_a_step_that_prints_nothing_is_ended_and_its_build_fails_for_that_reason(stage):
    stage.a_runner()

    build = stage.run([a_step("a", runScript="echo begun; sleep 600", noOutputSeconds=1, graceSeconds=1)])

    step = build["steps"][0]
    assert (build["status"], step["status"], step["reason"]) == ("FAILED", "FAILED", "no_output")
    assert b"nothing was printed for 1 s" in stage.log(step["id"])
    assert step["attempt"] == 1
