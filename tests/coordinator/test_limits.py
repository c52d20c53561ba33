"""Every limit ends what it limits, with a reason of its own, whatever the runner does."""

from datetime import timedelta
from typing import Any

import pytest

from coordinator.actions.release_step import release_step
from coordinator.actions.renew_leases import renew_leases
from shared.protocol import Action, Heartbeat, Phase
from tests.factories import Api, Held, Mill, a_spec, a_step


def beat(mill: Mill, held: Held, phase: Phase = Phase.RUNNING) -> Any:
    """One heartbeat for this step; the order it is answered with."""
    said = Heartbeat(session=held.runner.session, attempts=[held.report(phase)])
    return mill.now(renew_leases, mill.site, held.runner.caller, said).attempts[0]


def keep_beating(mill: Mill, held: Held, seconds: float, phase: Phase = Phase.RUNNING) -> None:
    """Let so much time pass, in which the runner says that all is well and the watch looks."""
    pause = 10 if seconds < 300 else 50
    for _ in range(int(seconds // pause)):
        mill.clock.advance(pause)
        beat(mill, held, phase)
        mill.expire()


# --- the queue


def test_a_step_that_nobody_takes_within_its_limit_has_failed(mill: Mill) -> None:
    build = mill.a_build([a_step("first", queueTimeoutSeconds=30), a_step("behind", ["first"])])

    mill.clock.advance(29)
    assert mill.expire() == 0
    mill.clock.advance(1)
    assert mill.expire() == 1

    assert mill.states(build) == {"first": "failed", "behind": "skipped"}
    assert mill.step(build.steps["first"]).reason == "queue_timeout"
    assert (mill.build(build.id).state, mill.build(build.id).reason) == ("failed", "queue_timeout")
    assert mill.acquire(mill.a_runner()) == []


def test_waiting_counts_from_when_the_step_could_be_taken(mill: Mill) -> None:
    build = mill.a_build([a_step("first"), a_step("behind", ["first"], queueTimeoutSeconds=30)])
    (first,) = mill.acquire(mill.a_runner())
    mill.start(first)

    mill.clock.advance(50)
    mill.complete(first)
    mill.clock.advance(29)
    assert mill.expire() == 0
    mill.clock.advance(1)
    assert mill.expire() == 1

    assert mill.states(build)["behind"] == "failed"


def test_a_step_that_was_taken_in_time_runs_as_long_as_it_may(mill: Mill) -> None:
    held = mill.a_running_step([a_step("test", queueTimeoutSeconds=30)])

    keep_beating(mill, held, 100)

    assert mill.step(held.step_id).state == "running"


def test_a_step_that_waits_for_its_retry_is_not_yet_waiting_for_a_runner(mill: Mill) -> None:
    held = mill.a_running_step([a_step("test", queueTimeoutSeconds=5)])
    mill.clock.advance(60)
    mill.complete(held, "failed", reason="daemon_error")

    mill.clock.advance(14)
    assert mill.expire() == 0
    mill.clock.advance(1)
    assert mill.expire() == 1

    assert mill.step(held.step_id).reason == "queue_timeout"


def test_a_runner_and_the_limit_of_the_queue_never_both_get_the_step(mill: Mill) -> None:
    from coordinator.actions.end_queueing import end_queueing
    from tests.factories import together

    for _ in range(5):
        build = mill.a_build([a_step("test", queueTimeoutSeconds=10)])
        runner = mill.a_runner()
        mill.clock.advance(10)

        acquired, ended = together(
            lambda runner=runner: mill.acquire(runner), lambda: mill.now(end_queueing, mill.site)
        )

        assert (len(acquired), ended) in ((1, 0), (0, 1))  # type: ignore[arg-type]
        assert mill.states(build)["test"] == ("claimed" if acquired else "failed")


# --- the whole build


def test_a_build_that_takes_too_long_ends_with_all_its_steps(mill: Mill) -> None:
    build = mill.a_build(a_spec(runs=[], queued=[], behind=["runs"]), timeout_seconds=100)
    (held,) = mill.acquire(mill.a_runner())
    mill.start(held)

    keep_beating(mill, held, 90)
    assert beat(mill, held).action is Action.CONTINUE
    keep_beating(mill, held, 10)

    order = beat(mill, held)
    assert (order.action, order.reason) == (Action.CANCEL, "build_timeout")
    assert sorted(mill.states(build).values()) == ["running", "skipped", "skipped"]
    mill.complete(held, "failed", reason="cancelled", exit_code=143)
    step = mill.step(held.step_id)
    assert (step.state, step.reason) == ("cancelled", "build_timeout")
    assert (mill.build(build.id).state, mill.build(build.id).reason) == ("failed", "build_timeout")
    assert len(mill.audited("build.overdue")) == 1


def test_the_time_of_a_build_counts_from_its_first_claim(mill: Mill) -> None:
    build = mill.a_build(timeout_seconds=100)

    mill.clock.advance(500)
    mill.expire()
    assert mill.build(build.id).state == "queued"
    (held,) = mill.acquire(mill.a_runner())
    mill.start(held)
    keep_beating(mill, held, 90)

    assert mill.build(build.id).state == "running"
    assert beat(mill, held).action is Action.CONTINUE


def test_a_build_whose_time_is_over_ends_without_a_runner_that_is_gone(mill: Mill) -> None:
    build = mill.a_build(timeout_seconds=30)
    (held,) = mill.acquire(mill.a_runner())
    mill.start(held)

    mill.clock.advance(31)
    mill.expire()
    mill.expire()

    assert (mill.build(build.id).state, mill.build(build.id).reason) == ("failed", "build_timeout")


def test_a_success_that_comes_after_the_time_of_the_build_is_none(mill: Mill) -> None:
    build = mill.a_build(timeout_seconds=30)
    (held,) = mill.acquire(mill.a_runner())
    mill.start(held)
    keep_beating(mill, held, 30)

    verdict = mill.complete(held)

    assert (verdict.state, verdict.is_build_complete) == ("cancelled", True)
    assert mill.build(build.id).state == "failed"


# --- the run, by the coordinator's own clock


@pytest.mark.threat("I08")
def test_a_runner_that_only_ever_says_that_it_lives_does_not_keep_its_step(mill: Mill) -> None:
    held = mill.a_running_step([a_step("test", timeoutSeconds=120, graceSeconds=20, retry={"max": 3})])

    keep_beating(mill, held, 190)
    assert beat(mill, held).action is Action.CONTINUE
    keep_beating(mill, held, 10)
    order = beat(mill, held)
    assert (order.action, order.reason, order.grace_s) == (Action.CANCEL, "timeout", 20)
    keep_beating(mill, held, 70)
    assert mill.step(held.step_id).state == "running"
    keep_beating(mill, held, 10)

    step = mill.step(held.step_id)
    assert (step.state, step.reason) == ("failed", "timeout")
    assert mill.build(step.build_id).state == "failed"
    assert beat(mill, held).action is Action.ABANDON


@pytest.mark.threat("I08")
def test_a_runner_that_stops_when_it_is_told_ends_the_step_as_timed_out(mill: Mill) -> None:
    held = mill.a_running_step([a_step("test", timeoutSeconds=120)])
    keep_beating(mill, held, 190)

    assert mill.complete(held, "failed", reason="cancelled", exit_code=143).state == "failed"

    assert mill.step(held.step_id).reason == "timeout"


def test_who_hands_on_what_a_script_made_has_an_hour_for_it(mill: Mill) -> None:
    held = mill.a_running_step([a_step("test", timeoutSeconds=60)])

    keep_beating(mill, held, 600, Phase.UPLOADING)
    assert beat(mill, held, Phase.UPLOADING).action is Action.CONTINUE
    keep_beating(mill, held, 3150, Phase.UPLOADING)

    assert beat(mill, held, Phase.UPLOADING).action is Action.CANCEL


@pytest.mark.threat("I08")
def test_a_claim_that_is_never_started_does_not_live_for_ever(mill: Mill) -> None:
    held = mill.an_acquired_step([a_step("test", pullTimeoutSeconds=60)])

    keep_beating(mill, held, 3600, Phase.PULLING)
    assert beat(mill, held, Phase.PULLING).action is Action.CONTINUE
    keep_beating(mill, held, 60, Phase.PULLING)
    assert beat(mill, held, Phase.PULLING).reason == "pull_timeout"
    keep_beating(mill, held, 80, Phase.PULLING)

    step = mill.step(held.step_id)
    assert (step.state, step.reason) == ("failed", "pull_timeout")


def test_a_claim_that_is_given_back_when_its_time_is_over_has_failed(mill: Mill) -> None:
    held = mill.an_acquired_step([a_step("test", pullTimeoutSeconds=60)])
    keep_beating(mill, held, 3700, Phase.PULLING)

    mill.now(release_step, mill.site, held.runner.caller, held.step_id, held.proof, reason="")

    step = mill.step(held.step_id)
    assert (step.state, step.reason) == ("failed", "pull_timeout")
    assert mill.build(step.build_id).state == "failed"


def test_how_far_a_runner_is_can_be_seen(mill: Mill) -> None:
    held = mill.an_acquired_step()

    for phase in (Phase.PULLING, Phase.CHECKOUT, Phase.RESTORING):
        beat(mill, held, phase)
        assert mill.step(held.step_id).phase == phase


# --- what is said over HTTP


def test_limits_are_told_to_the_runner(mill: Mill) -> None:
    limits = {"graceSeconds": 33, "noOutputSeconds": 44, "pullTimeoutSeconds": 55, "timeoutSeconds": 66}
    held = mill.an_acquired_step([a_step("test", **limits)])

    told = held.claim.limits
    assert (told.grace_s, told.no_output_s, told.pull_timeout_s, told.timeout_s) == (33, 44, 55, 66)
    answer = mill.start(held)
    assert (answer.grace_s, answer.timeout_s) == (33, 66)


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"graceSeconds": 301}, "graceSeconds"),
        ({"graceSeconds": -1}, "graceSeconds"),
        ({"noOutputSeconds": 0}, "noOutputSeconds"),
        ({"pullTimeoutSeconds": "60"}, "pullTimeoutSeconds"),
        ({"queueTimeoutSeconds": 604801}, "queueTimeoutSeconds"),
        ({"retry": {"max": 11}}, "retry.max"),
        ({"retry": {"infra": 3}}, "retry.infra"),
        ({"retry": {"exitCodes": [0]}}, "retry.exitCodes[0]"),
        ({"retry": {"exitCodes": [256]}}, "retry.exitCodes[0]"),
        ({"retry": {"times": 1}}, "retry.times"),
        ({"retry": 3}, "retry"),
    ],
)
def test_a_limit_that_cannot_be_is_refused_and_named(api: Api, fields: dict[str, Any], where: str) -> None:
    api.an_image()
    project = api.a_project()["id"]

    body = {"name": "w", "steps": [a_step("test", **fields)]}
    answer = api.client.post(f"/api/projects/{project}/workflows", json=body)

    assert answer.status_code == 400
    assert [fault["path"] for fault in answer.json()["details"]] == [f"steps[0].{where}"]


@pytest.mark.parametrize("value", [0, -1, 604801, "60", 1.5, True])
def test_a_time_limit_of_a_build_that_cannot_be_is_refused_and_named(api: Api, value: object) -> None:
    workflow = api.a_workflow()

    body = {"workflowId": workflow["id"], "timeoutSeconds": value}
    answer = api.client.post(f"/api/projects/{workflow['projectId']}/builds", json=body)

    assert answer.status_code == 400
    assert [fault["path"] for fault in answer.json()["details"]] == ["timeoutSeconds"]


def test_the_time_limit_of_a_build_is_shown(api: Api) -> None:
    assert api.a_build(timeoutSeconds=60)["timeoutSeconds"] == 60
    assert "timeoutSeconds" not in api.a_build()


def test_a_deadline_of_a_step_is_its_limit_its_grace_and_a_minute(mill: Mill) -> None:
    held = mill.a_running_step([a_step("test", timeoutSeconds=100, graceSeconds=5)])

    assert mill.step(held.step_id).deadline_at == mill.clock() + timedelta(seconds=165)


# --- very many of them


def test_steps_that_may_still_pull_do_not_hide_one_that_may_not(mill: Mill) -> None:
    patient = a_step("patient", pullTimeoutSeconds=7200)
    hasty = a_step("hasty", pullTimeoutSeconds=60)
    runner = mill.a_runner()
    held = []
    for spec in [[patient]] * 100 + [[hasty]]:
        held.append(mill.an_acquired_step(spec, runner))
        mill.clock.advance(0.001)
    mill.heartbeat(runner, *held)
    mill.clock.advance(3600 + 70)
    mill.heartbeat(runner, *held)

    mill.expire()

    assert mill.step(held[-1].step_id).cancel_reason == "pull_timeout"
    assert mill.step(held[0].step_id).cancel_requested_at is None


def test_a_thousand_limits_of_the_queue_do_not_hide_the_one_that_is_over(mill: Mill) -> None:
    old = mill.a_build([a_step("test", queueTimeoutSeconds=20_000)])
    mill.clock.advance(19_000)
    for first in range(10_000, 11_000, 100):
        limits = range(first, first + 100)
        mill.a_build([a_step(f"step-{limit}", queueTimeoutSeconds=limit) for limit in limits])
    mill.clock.advance(1_000)

    assert mill.expire() == 1

    assert mill.states(old) == {"test": "failed"}


def test_of_very_many_that_waited_too_long_some_end_at_each_look(mill: Mill) -> None:
    limits = range(1_000, 1_120)
    builds = [mill.a_build([a_step("test", queueTimeoutSeconds=limit)]) for limit in limits]
    mill.clock.advance(2_000)

    assert [mill.expire(), mill.expire(), mill.expire()] == [100, 20, 0]

    assert {mill.build(build.id).state for build in builds} == {"failed"}
