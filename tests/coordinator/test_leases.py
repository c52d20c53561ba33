"""Who holds a step: start, heartbeats, silence, and coming back."""

from typing import Any

import pytest
from sqlalchemy import event

from coordinator.actions.append_log import append_log
from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.end_unheard import UNENDED
from coordinator.actions.expire_leases import expire_leases
from coordinator.actions.leased_step import LeaseProof
from coordinator.actions.release_step import release_step
from coordinator.actions.renew_leases import renew_leases, resume_attempts
from coordinator.actions.say_bye import say_bye
from coordinator.actions.start_step import start_step
from coordinator.errors import Conflict, NotFound, SessionSuperseded, StaleAttempt
from coordinator.rules.leases import lease_token
from coordinator.store import runners
from shared.protocol import Action, AttemptReport, Heartbeat, Phase, Resume, Start
from tests.factories import LOCAL, ON_POSTGRES, Held, MadeRunner, Mill, a_spec, a_step

AMNESTY = 90
LOST = 61


@pytest.fixture
def later(mill: Mill) -> Mill:
    """Well after the start, so that silence counts."""
    mill.clock.advance(AMNESTY + 10)
    return mill


def release(mill: Mill, held: Held) -> None:
    mill.now(release_step, mill.site, held.runner.caller, held.step_id, held.proof, reason="no room")


def resume(mill: Mill, runner: MadeRunner, *held: Held, session: str = "a-newer-process") -> list[Any]:
    said = Resume(session=session, attempts=[one.report() for one in held])
    return mill.now(resume_attempts, mill.site, runner.caller, said).attempts


# Start


def test_a_step_runs_once_its_runner_says_so(mill: Mill) -> None:
    held = mill.an_acquired_step([a_step("test", timeoutSeconds=77)])

    answer = mill.start(held)

    assert (answer.action, answer.timeout_s) == ("go", 77)
    assert mill.step(held.step_id).state == "running"
    assert mill.step(held.step_id).started_at == mill.clock()
    assert mill.attempts(held.step_id)[0].started_at == mill.clock()


def test_a_start_that_is_sent_again_gets_the_same_answer_and_counts_from_the_first(mill: Mill) -> None:
    held = mill.an_acquired_step()
    began = mill.clock()
    first = mill.start(held)
    mill.clock.advance(5)

    assert mill.start(held) == first

    assert mill.step(held.step_id).started_at == began


def test_the_image_that_really_runs_is_remembered(mill: Mill) -> None:
    held = mill.an_acquired_step()

    said = Start(image_digest="busybox@sha256:" + "0" * 64)
    mill.now(start_step, mill.site, held.runner.caller, held.step_id, held.proof, said)

    assert mill.step(held.step_id).image_digest == said.image_digest
    assert mill.attempts(held.step_id)[0].image_digest == said.image_digest


@pytest.mark.threat("I01")
def test_no_other_runner_attempt_or_lease_may_start_a_step(mill: Mill) -> None:
    held = mill.an_acquired_step()
    other = mill.a_runner()
    wrong = [
        (other.caller, held.proof),
        (held.runner.caller, LeaseProof(2, held.claim.lease)),
        (held.runner.caller, LeaseProof(1, "")),
        (held.runner.caller, LeaseProof(1, held.claim.lease[:-1] + "é")),
        (held.runner.caller, LeaseProof(1, "A" * 43)),
    ]

    for caller, proof in wrong:
        with pytest.raises(StaleAttempt):
            mill.now(start_step, mill.site, caller, held.step_id, proof, Start())

    assert mill.step(held.step_id).state == "claimed"


def test_a_step_that_is_not_there_cannot_start(mill: Mill) -> None:
    held = mill.an_acquired_step()

    with pytest.raises(NotFound):
        mill.now(start_step, mill.site, held.runner.caller, "nope", held.proof, Start())


def test_a_lease_is_bound_to_everything_it_was_given_for() -> None:
    said = {"step_id": "s", "attempt": 1, "runner_id": "r", "request_id": "q"}
    lease = lease_token(b"key", **said)

    assert lease == lease_token(b"key", **said)
    assert lease != lease_token(b"other", **said)
    for change in ({"step_id": "t"}, {"attempt": 2}, {"runner_id": "s"}, {"request_id": "p"}):
        assert lease != lease_token(b"key", **{**said, **change})


# Heartbeats


def test_a_heartbeat_acknowledges_the_claims_it_names(mill: Mill) -> None:
    held = mill.an_acquired_step()

    assert mill.heartbeat(held.runner, held)[0].action is Action.CONTINUE

    mill.clock.advance(21)
    assert mill.expire() == 0
    assert mill.step(held.step_id).state == "claimed"


def test_a_heartbeat_for_what_is_not_held_is_told_to_abandon(mill: Mill) -> None:
    held = mill.an_acquired_step()
    other = mill.a_runner()
    unknown = AttemptReport(step_id="nope", attempt=1, lease="x", phase=Phase.RUNNING)

    orders = mill.now(
        resume_attempts,
        mill.site,
        other.caller,
        Resume(session="process-one", attempts=[held.report(), unknown]),
    ).attempts

    assert [order.action for order in orders] == [Action.ABANDON, Action.ABANDON]
    assert [order.reason for order in orders] == ["stale_attempt", "unknown"]
    assert mill.step(held.step_id).acked_at is None


def test_a_heartbeat_tells_the_runners_facts(mill: Mill) -> None:
    runner = mill.a_runner()
    mill.heartbeat(runner, slots=4, disk_free=7_000_000_000, draining=True)

    row = mill.tx(runners.find_runner, runner.id)
    assert row is not None
    assert (row.slots, row.disk_free, row.draining) == (4, 7_000_000_000, True)
    assert row.last_seen_at == mill.clock()


def test_a_former_process_is_told_that_it_was_superseded(mill: Mill) -> None:
    held = mill.a_running_step()
    resume(mill, held.runner, held)

    with pytest.raises(SessionSuperseded):
        mill.heartbeat(held.runner, held)


# Silence


@pytest.mark.threat("I07")
def test_a_claim_that_nobody_names_is_ready_again_without_a_penalty(mill: Mill) -> None:
    held = mill.an_acquired_step()

    mill.clock.advance(20)
    assert mill.expire() == 0
    mill.clock.advance(1)
    assert mill.expire() == 1

    step = mill.step(held.step_id)
    assert (step.state, step.infra_retries, step.runner_id) == ("ready", 0, None)
    assert mill.attempts(held.step_id)[0].outcome == "unclaimed"
    again = mill.acquire(mill.a_runner())[0]
    assert (again.step_id, again.claim.attempt) == (held.step_id, 2)


def test_who_comes_late_to_a_claim_that_has_expired_abandons_it(mill: Mill) -> None:
    held = mill.an_acquired_step()
    mill.clock.advance(21)
    mill.expire()

    assert mill.heartbeat(held.runner, held)[0].action is Action.ABANDON
    with pytest.raises(StaleAttempt):
        mill.start(held)


def test_a_runner_that_falls_silent_loses_its_step_to_another(later: Mill) -> None:
    held = later.a_running_step()

    later.clock.advance(59)
    assert later.expire() == 0
    later.clock.advance(2)
    assert later.expire() == 1

    step = later.step(held.step_id)
    assert (step.state, step.infra_retries) == ("ready", 1)
    attempt = later.attempts(held.step_id)[0]
    assert (attempt.outcome, attempt.reason) == ("lost", "runner_lost")
    later.clock.advance(10)
    again = later.acquire(later.a_runner())[0]
    assert (again.step_id, again.claim.attempt) == (held.step_id, 2)


def test_heartbeats_keep_a_step_for_ever(later: Mill) -> None:
    held = later.a_running_step()

    for _ in range(20):
        later.clock.advance(30)
        assert later.heartbeat(held.runner, held)[0].action is Action.CONTINUE
        assert later.expire() == 0


def test_log_bytes_keep_a_step_too(later: Mill) -> None:
    held = later.a_running_step()

    later.clock.advance(50)
    later.append(held, 0, b"still here\n")
    later.clock.advance(50)

    assert later.expire() == 0


def test_nobody_counts_as_silent_right_after_a_start(mill: Mill) -> None:
    held = mill.a_running_step()

    mill.clock.advance(AMNESTY - 1)
    assert mill.expire() == 0
    mill.clock.advance(1)
    assert mill.expire() == 1

    assert mill.step(held.step_id).state == "ready"


def test_a_step_is_lost_three_times_at_most(later: Mill) -> None:
    later.a_build(a_spec(test=[], behind=["test"]))
    runner = later.a_runner()
    for attempt in (1, 2, 3):
        held = later.acquire(runner)[0]
        assert held.claim.attempt == attempt
        later.start(held)
        later.clock.advance(LOST)
        assert later.expire() == 1
        later.clock.advance(60)

    step = later.step(held.step_id)
    assert (step.state, step.reason) == ("failed", "runner_lost")
    assert later.build(step.build_id).state == "failed"
    assert later.build(step.build_id).reason == "runner_lost"
    assert later.acquire(runner) == []


def test_an_exclusive_step_is_waited_for_longer_and_never_run_again(later: Mill) -> None:
    held = later.a_running_step([a_step("deploy", exclusive=True)])

    later.clock.advance(299)
    assert later.expire() == 0
    later.clock.advance(2)
    assert later.expire() == 1

    step = later.step(held.step_id)
    assert (step.state, step.reason) == ("failed", "runner_lost")
    assert later.build(step.build_id).state == "failed"


@pytest.fixture
def one_at_a_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for silence sees a single step, so that what comes first may hide what comes behind."""
    monkeypatch.setattr("coordinator.actions.expire_leases.BATCH", 1)
    monkeypatch.setattr("coordinator.actions.force_stops.BATCH", 1)


@pytest.mark.usefixtures("one_at_a_look")
def test_steps_that_are_waited_for_do_not_hide_those_that_are_lost(later: Mill) -> None:
    waited_for = later.a_running_step([a_step("deploy", exclusive=True)])
    cancelled = later.a_running_step()
    lost = later.a_running_step()
    later.clock.advance(LOST - 10)
    later.now(cancel_build, later.site, LOCAL, later.step(cancelled.step_id).build_id)
    later.clock.advance(10)

    assert later.now(expire_leases, later.site) == 1

    states = [later.step(held.step_id).state for held in (waited_for, cancelled, lost)]
    assert states == ["running", "running", "ready"]


@pytest.mark.usefixtures("one_at_a_look")
def test_cancels_that_are_waited_for_do_not_hide_those_that_nobody_will_confirm(later: Mill) -> None:
    alive, gone = later.a_running_step(), later.a_running_step()
    for held in (alive, gone):
        later.now(cancel_build, later.site, LOCAL, later.step(held.step_id).build_id)
    later.clock.advance(21)
    later.heartbeat(alive.runner, alive)

    assert later.expire() == 1

    assert [later.step(held.step_id).state for held in (alive, gone)] == ["running", "cancelled"]


@pytest.mark.usefixtures("one_at_a_look")
def test_who_has_been_silent_longest_is_lost_first(later: Mill) -> None:
    first, second = later.a_running_step(), later.a_running_step()
    later.clock.advance(5)
    later.heartbeat(first.runner, first)
    later.clock.advance(LOST)

    assert later.expire() == 1

    assert [later.step(held.step_id).state for held in (first, second)] == ["running", "ready"]


@ON_POSTGRES
@pytest.mark.threat("I05")
def test_a_heartbeat_between_the_look_and_the_move_keeps_the_step(later: Mill) -> None:
    """The reaper has seen silence; before it acts, the runner speaks."""
    held = later.a_running_step()
    later.clock.advance(LOST)
    engine = later.state.lanes.database.writer
    spoken: list[Action] = []

    @event.listens_for(engine, "after_cursor_execute")
    def speak(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if "steps.acked_at IS NOT NULL" in statement and statement.startswith("SELECT") and not spoken:
            spoken.append(Action.ABANDON)
            spoken[0] = later.heartbeat(held.runner, held)[0].action

    try:
        moved = later.expire()
    finally:
        event.remove(engine, "after_cursor_execute", speak)

    assert spoken == [Action.CONTINUE]
    assert moved == 0
    assert later.step(held.step_id).state == "running"


@pytest.mark.parametrize("kind", ["lost", "stopped"])
def test_the_log_of_a_runner_that_nobody_waits_for_ends_with_a_line_that_says_so(
    later: Mill, kind: str
) -> None:
    held = later.a_running_step([a_step("deploy", exclusive=True)])
    later.append(held, 0, b"before\n")
    if kind == "stopped":
        later.now(cancel_build, later.site, LOCAL, later.step(held.step_id).build_id)
    later.clock.advance(LOST * 6)
    later.expire()

    (attempt,) = later.attempts(held.step_id)
    step = later.step(held.step_id)
    log = later.site.logs.path(step.build_id, held.step_id, 1).read_bytes()
    assert step.state == ("failed" if kind == "lost" else "cancelled")
    assert attempt.log_state == "gap"
    assert log.startswith(b"before\n\n[buildmill] error: bytes may be missing here, behind byte 7: ")
    assert len(log) == step.log_size == attempt.log_size


# Coming back


def test_who_comes_back_before_anyone_else_took_the_step_goes_on(later: Mill) -> None:
    held = later.a_running_step()
    later.clock.advance(LOST)
    later.expire()

    order = later.heartbeat(held.runner, held)[0]

    assert (order.action, order.reason) == (Action.CONTINUE, "revived")
    assert later.step(held.step_id).state == "running"
    attempts = later.attempts(held.step_id)
    assert [(one.attempt, one.outcome, one.finished_at) for one in attempts] == [(1, None, None)]
    assert later.complete(held).state == "succeeded"


def test_who_comes_back_with_a_line_of_its_log_goes_on_too(later: Mill) -> None:
    held = later.a_running_step()
    later.append(held, 0, b"before\n")
    later.clock.advance(LOST)
    later.expire()
    assert later.attempts(held.step_id)[0].log_state == "gap"

    later.append(held, 7, b"behind\n")

    assert later.step(held.step_id).state == "running"
    assert later.attempts(held.step_id)[0].log_state == "open"
    assert later.complete(held, log_size=14).state == "succeeded"
    assert later.attempts(held.step_id)[0].log_state == "complete"


def test_a_completion_of_a_lost_attempt_counts_while_nobody_has_taken_the_step(later: Mill) -> None:
    held = later.a_running_step()
    later.clock.advance(LOST)
    later.expire()

    verdict = later.complete(held)

    assert (verdict.state, verdict.is_build_complete) == ("succeeded", True)
    assert later.attempts(held.step_id)[0].outcome == "succeeded"


def test_the_log_of_an_attempt_that_was_lost_released_or_given_up_stays_readable(later: Mill) -> None:
    runner = later.a_runner()
    lost = later.a_running_step(runner=runner)
    later.append(lost, 0, b"lost\n")
    later.clock.advance(LOST)
    later.expire()
    released = later.an_acquired_step(runner=runner)
    later.append(released, 0, b"released\n")
    release(later, released)
    cancelled = later.acquire(runner)[0]  # the same step again
    later.append(cancelled, 0, b"cancelled\n")
    build_id = later.step(cancelled.step_id).build_id
    later.now(cancel_build, later.site, LOCAL, build_id)
    later.clock.advance(LOST)
    later.expire()

    assert later.attempts(lost.step_id)[0].log_size == 5
    sizes = [one.log_size for one in later.attempts(cancelled.step_id)]
    assert sizes == [9 + len(UNENDED % 9), 10 + len(UNENDED % 10)]


def test_the_log_of_a_lost_attempt_says_so_once_another_attempt_runs(later: Mill) -> None:
    lost = later.a_running_step()
    later.append(lost, 0, b"half a li")
    later.clock.advance(LOST)
    later.expire()
    path = later.site.logs.path(later.step(lost.step_id).build_id, lost.step_id, 1)
    before = path.read_bytes()

    later.clock.advance(60)
    again = later.acquire(later.a_runner())[0]
    later.start(again)
    later.start(again)

    first, second = later.attempts(lost.step_id)
    assert before == b"half a li"
    assert path.read_bytes() == before + UNENDED % 9
    assert (first.log_state, first.log_size) == ("gap", len(path.read_bytes()))
    assert (second.log_state, second.log_size) == ("open", 0)


def test_the_log_of_a_lost_attempt_says_so_also_when_nothing_came_of_the_claim_behind_it(later: Mill) -> None:
    lost = later.a_running_step()
    later.append(lost, 0, b"half a li")
    later.clock.advance(LOST)
    later.expire()
    later.clock.advance(60)
    runner = later.a_runner()
    release(later, later.acquire(runner)[0])
    path = later.site.logs.path(later.step(lost.step_id).build_id, lost.step_id, 1)

    third = later.acquire(runner)[0]
    later.start(third)
    later.start(third)

    assert path.read_bytes() == b"half a li" + UNENDED % 9
    first = later.attempts(lost.step_id)[0]
    assert (first.log_state, first.log_size) == ("gap", 9 + len(UNENDED % 9))


def test_each_lost_attempt_says_so_once(later: Mill) -> None:
    lost = later.a_running_step()
    for text in (b"first\n", b"second\n"):
        later.append(lost, 0, text)
        later.clock.advance(LOST)
        later.expire()
        later.clock.advance(60)
        lost = later.acquire(later.a_runner())[0]
        later.start(lost)

    build_id = later.step(lost.step_id).build_id
    logs = [later.site.logs.path(build_id, lost.step_id, number).read_bytes() for number in (1, 2)]
    assert logs == [b"first\n" + UNENDED % 6, b"second\n" + UNENDED % 7]


@pytest.mark.threat("I04")
def test_a_zombie_changes_nothing_any_more(later: Mill) -> None:
    held = later.a_running_step()
    later.append(held, 0, b"one\n")
    later.clock.advance(LOST)
    later.expire()
    later.clock.advance(10)
    second = later.acquire(later.a_runner())[0]
    later.start(second)
    later.append(second, 0, b"two\n")

    assert later.heartbeat(held.runner, held)[0].action is Action.ABANDON
    for write in (
        lambda: later.append(held, 4, b"zombie\n"),
        lambda: later.complete(held),
        lambda: later.complete(held, "failed"),
        lambda: later.start(held),
        lambda: release(later, held),
    ):
        with pytest.raises(StaleAttempt):
            write()

    assert later.step(held.step_id).log_size == 4
    assert later.complete(second).state == "succeeded"
    assert [one.outcome for one in later.attempts(held.step_id)] == ["lost", "succeeded"]


def test_a_runner_that_restarts_within_its_time_goes_on(mill: Mill) -> None:
    held = mill.a_running_step()
    claimed_elsewhere = mill.an_acquired_step(runner=mill.a_runner())

    orders = resume(mill, held.runner, held, claimed_elsewhere)

    assert [order.action for order in orders] == [Action.CONTINUE, Action.ABANDON]
    newer = MadeRunner(held.runner.id, held.runner.secret, "a-newer-process")
    assert mill.heartbeat(newer, held)[0].action is Action.CONTINUE


def test_a_runner_that_resumes_hears_of_the_cancel(mill: Mill) -> None:
    held = mill.a_running_step()
    mill.now(cancel_build, mill.site, LOCAL, mill.step(held.step_id).build_id)

    assert resume(mill, held.runner, held)[0].action is Action.CANCEL


def test_who_did_not_hear_the_answer_to_its_completion_is_not_told_to_throw_it_away(mill: Mill) -> None:
    held = mill.a_running_step()
    mill.complete(held)

    order = mill.heartbeat(held.runner, held)[0]

    assert (order.action, order.reason) == (Action.CONTINUE, "ended")


# Giving back


def test_a_released_step_is_ready_at_once_and_pays_nothing(mill: Mill) -> None:
    held = mill.an_acquired_step()

    release(mill, held)

    step = mill.step(held.step_id)
    assert (step.state, step.infra_retries) == ("ready", 0)
    attempt = mill.attempts(held.step_id)[0]
    assert (attempt.outcome, attempt.detail) == ("released", "no room")
    assert mill.acquire(mill.a_runner())[0].claim.attempt == 2


def test_what_was_released_cannot_be_revived(mill: Mill) -> None:
    held = mill.an_acquired_step()
    release(mill, held)

    assert mill.heartbeat(held.runner, held)[0].action is Action.ABANDON
    assert mill.step(held.step_id).state == "ready"
    with pytest.raises(StaleAttempt):
        release(mill, held)


def test_a_step_whose_script_may_have_run_cannot_be_released(mill: Mill) -> None:
    held = mill.a_running_step()

    with pytest.raises(Conflict):
        release(mill, held)

    assert mill.step(held.step_id).state == "running"


def test_bye_gives_back_what_was_claimed_and_never_begun(mill: Mill) -> None:
    mill.a_build(a_spec(one=[], two=[]))
    runner, other = mill.a_runner(), mill.a_runner()
    claimed = mill.acquire(runner)[0]
    elsewhere = mill.acquire(other)[0]

    mill.now(say_bye, mill.site, runner.caller)

    assert mill.step(claimed.step_id).state == "ready"
    assert mill.step(elsewhere.step_id).state == "claimed"


def test_bye_leaves_what_runs_alone(mill: Mill) -> None:
    held = mill.a_running_step()

    mill.now(say_bye, mill.site, held.runner.caller)

    assert mill.step(held.step_id).state == "running"


def test_infrastructure_failures_are_tried_again_twice_with_growing_pauses(mill: Mill) -> None:
    held = mill.an_acquired_step()
    for pause in (10, 20):
        mill.start(held)
        verdict = mill.complete(held, "failed", reason="daemon_error")
        assert (verdict.state, verdict.is_build_complete) == ("ready", False)
        mill.clock.advance(pause - 1)
        assert mill.acquire(held.runner) == []
        mill.clock.advance(1)
        held = mill.acquire(held.runner)[0]

    mill.start(held)
    verdict = mill.complete(held, "failed", reason="daemon_error")

    assert (verdict.state, verdict.is_build_complete) == ("failed", True)
    assert [one.outcome for one in mill.attempts(held.step_id)] == ["failed"] * 3
    assert mill.build(mill.step(held.step_id).build_id).reason == "daemon_error"


def test_an_exclusive_step_is_not_tried_again(mill: Mill) -> None:
    held = mill.a_running_step([a_step("deploy", exclusive=True)])

    assert mill.complete(held, "failed", reason="daemon_error").state == "failed"


def test_a_failure_of_the_user_is_not_tried_again(mill: Mill) -> None:
    held = mill.a_running_step()

    assert mill.complete(held, "failed", reason="timeout", exit_code=143).state == "failed"


def test_a_replayed_heartbeat_does_not_revive_what_was_given_up_for_infrastructure(mill: Mill) -> None:
    held = mill.a_running_step()
    mill.complete(held, "failed", reason="internal")

    assert mill.heartbeat(held.runner, held)[0].action is Action.ABANDON
    assert mill.step(held.step_id).state == "ready"


def test_a_write_needs_the_attempt_to_be_held_by_a_known_step(mill: Mill) -> None:
    held = mill.an_acquired_step()

    with pytest.raises(NotFound):
        mill.now(append_log, mill.site, held.runner.caller, "nope", held.proof, offset=0, data=b"x")


def test_a_heartbeat_may_name_nothing(mill: Mill) -> None:
    runner = mill.a_runner()

    orders = mill.now(
        renew_leases,
        mill.site,
        runner.caller,
        Heartbeat(session=runner.session),
    )

    assert orders.attempts == []
    assert orders.next == 5.0
