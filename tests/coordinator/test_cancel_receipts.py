"""The receipt of a cancel shows what is proved of each step: told, dead, cleaned up, and what is left."""

from datetime import timedelta
from typing import Any

import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.record_cleaning import record_cleaning
from coordinator.actions.show_cancel import CancelView, StoppedStep, show_cancel
from coordinator.errors import ForeignLease, NotFound
from shared.protocol import Action, Cleaned
from tests.factories import LOCAL, Api, Held, Mill, a_spec, a_step


def cancel(mill: Mill, build_id: str) -> str:
    return mill.now(cancel_build, mill.site, LOCAL, build_id).cancel_id or ""


def cancelled(mill: Mill, held: Held) -> str:
    """The receipt of cancelling the build of this step."""
    return cancel(mill, mill.step(held.step_id).build_id)


def receipt(mill: Mill, cancel_id: str) -> CancelView:
    return mill.now(show_cancel, LOCAL, cancel_id)


def only_step(mill: Mill, cancel_id: str) -> StoppedStep:
    (step,) = receipt(mill, cancel_id).steps
    return step


def clean(mill: Mill, held: Held, **said: Any) -> None:
    words = Cleaned(**{"cleaned_age_s": 0.0, **said})
    mill.now(record_cleaning, mill.site, held.runner.caller, held.step_id, held.proof, words)


@pytest.fixture
def later(mill: Mill) -> Mill:
    """After the time in which nobody counts as silent."""
    mill.clock.advance(100)
    return mill


def test_steps_that_nobody_held_are_confirmed_at_once(mill: Mill) -> None:
    build = mill.a_build(a_spec(one=[], two=["one"]))

    view = receipt(mill, cancel(mill, build.id))

    assert view.is_done
    assert view.is_confirmed
    assert view.requested_at == mill.clock()
    assert [(step.row.name, step.state, step.is_confirmed) for step in view.steps] == [
        ("one", "cancelled", True),
        ("two", "cancelled", True),
    ]


def test_a_step_that_runs_is_confirmed_when_its_runner_says_that_nothing_is_left(mill: Mill) -> None:
    held = mill.a_running_step()
    cancel_id = cancelled(mill, held)
    assert not receipt(mill, cancel_id).is_done
    asked_at = mill.clock()

    mill.clock.advance(3)
    mill.complete(held, "failed", reason="cancelled", exit_code=143)
    assert not receipt(mill, cancel_id).is_done
    mill.clock.advance(1)
    clean(mill, held, term_age_s=3.5, dead_age_s=2.25, cleaned_age_s=0.5)

    view = receipt(mill, cancel_id)
    (step,) = view.steps
    assert (view.is_done, view.is_confirmed, step.state) == (True, True, "cancelled")
    assert step.requested_at == asked_at
    assert step.row.term_at == asked_at + timedelta(seconds=0.5)
    assert step.row.dead_at == asked_at + timedelta(seconds=1.75)
    assert step.row.cleaned_at == asked_at + timedelta(seconds=3.5)
    assert (step.row.attempt, step.row.runner_id) == (1, held.runner.id)


def test_cleaned_before_the_completion_counts_as_well(mill: Mill) -> None:
    held = mill.a_running_step()
    cancel_id = cancelled(mill, held)

    clean(mill, held)
    assert not receipt(mill, cancel_id).is_done
    mill.complete(held, "failed", reason="cancelled")

    assert receipt(mill, cancel_id).is_done


def test_what_could_not_be_removed_is_shown_until_it_is(mill: Mill) -> None:
    held = mill.a_running_step()
    cancel_id = cancelled(mill, held)
    mill.complete(held, "failed", reason="cancelled")
    said = mill.clock.advance(1)
    clean(mill, held, leftovers=["container buildmill-x"])

    step = only_step(mill, cancel_id)
    assert (step.is_confirmed, step.row.leftovers) == (False, ["container buildmill-x"])
    mill.clock.advance(5)
    clean(mill, held, leftovers=["container buildmill-x"])
    assert only_step(mill, cancel_id).row.cleaned_at == said
    clean(mill, held)

    step = only_step(mill, cancel_id)
    assert (step.is_confirmed, step.row.leftovers, step.row.cleaned_at) == (True, [], mill.clock())


def test_the_first_word_counts_and_repeating_it_changes_nothing(mill: Mill) -> None:
    held = mill.a_running_step()
    cancel_id = cancelled(mill, held)
    for _ in range(3):
        clean(mill, held, term_age_s=1.0)
        mill.clock.advance(10)

    step = only_step(mill, cancel_id)

    assert step.row.cleaned_at == step.requested_at
    assert len(mill.audited("step.cleaned")) == 1


@pytest.mark.threat("I16")
def test_a_silent_runner_is_not_waited_for_and_confirms_when_it_is_back(mill: Mill) -> None:
    held = mill.a_running_step()
    cancel_id = cancelled(mill, held)

    mill.clock.advance(21)
    mill.expire()
    view = receipt(mill, cancel_id)
    assert (view.steps[0].state, view.is_done, view.is_confirmed) == ("cancelled", False, False)
    mill.clock.advance(60)
    view = receipt(mill, cancel_id)
    assert (view.is_done, view.is_confirmed) == (True, False)

    mill.clock.advance(3600)
    assert mill.heartbeat(held.runner, held)[0].action is Action.ABANDON
    clean(mill, held)

    assert receipt(mill, cancel_id).is_confirmed


def test_a_runner_that_was_silent_before_the_cancel_is_not_waited_for_at_all(later: Mill) -> None:
    held = later.a_running_step()
    later.clock.advance(25)
    cancel_id = cancelled(later, held)

    later.expire()

    assert only_step(later, cancel_id).state == "cancelled"


def test_a_grace_that_a_step_needs_is_waited_for(mill: Mill) -> None:
    held = mill.a_running_step([a_step("test", graceSeconds=100)])
    cancelled(mill, held)
    assert mill.heartbeat(held.runner, held)[0].grace_s == 100

    for _ in range(15):
        mill.clock.advance(10)
        mill.heartbeat(held.runner, held)
        assert mill.expire() == 0
    mill.clock.advance(10)
    mill.heartbeat(held.runner, held)

    assert mill.expire() == 1


def test_the_container_of_a_lost_runner_is_on_the_receipt_beside_that_of_its_successor(later: Mill) -> None:
    lost = later.a_running_step()
    later.clock.advance(61)
    later.expire()
    later.clock.advance(10)
    (held,) = later.acquire(later.a_runner())
    later.start(held)

    cancel_id = cancelled(later, held)
    later.complete(held, "failed", reason="cancelled")
    clean(later, held)

    first, second = receipt(later, cancel_id).steps
    assert (first.row.attempt, first.row.runner_id, first.state) == (1, lost.runner.id, "lost")
    assert (first.is_confirmed, second.is_confirmed) == (False, True)
    clean(later, lost)
    assert receipt(later, cancel_id).is_confirmed


def test_a_lost_step_that_waits_again_is_confirmed_by_the_runner_that_was_given_up(later: Mill) -> None:
    lost = later.a_running_step()
    later.clock.advance(61)
    later.expire()

    cancel_id = cancelled(later, lost)

    step = only_step(later, cancel_id)
    assert (step.row.attempt, step.state, step.is_confirmed) == (1, "cancelled", False)
    clean(later, lost)
    assert receipt(later, cancel_id).is_confirmed


@pytest.mark.threat("I16")
def test_a_claim_that_nobody_acknowledged_needs_no_proof(mill: Mill) -> None:
    held = mill.an_acquired_step()
    cancel_id = cancelled(mill, held)
    assert not receipt(mill, cancel_id).is_done

    mill.clock.advance(21)
    mill.expire()

    view = receipt(mill, cancel_id)
    assert (view.is_done, view.is_confirmed) == (True, True)


def test_steps_that_had_ended_are_not_on_the_receipt(mill: Mill) -> None:
    build = mill.a_build(a_spec(done=[], runs=[]))
    done, runs = mill.acquire(mill.a_runner(), slots=2)
    for held in (done, runs):
        mill.start(held)
    mill.complete(done)

    assert [step.row.step_id for step in receipt(mill, cancel(mill, build.id)).steps] == [runs.step_id]


@pytest.mark.threat("I01")
def test_only_the_runner_of_an_attempt_can_say_that_it_is_cleaned(mill: Mill) -> None:
    held, other = mill.a_running_step(), mill.a_runner()
    cancel_id = cancelled(mill, held)

    for wrong in (
        Held(held.claim, other),
        Held(held.claim.model_copy(update={"lease": "x" * 43}), held.runner),
        Held(held.claim.model_copy(update={"attempt": 2}), held.runner),
    ):
        with pytest.raises(ForeignLease):
            clean(mill, wrong)

    assert only_step(mill, cancel_id).row.cleaned_at is None


def test_a_receipt_that_is_not_there_cannot_be_shown(mill: Mill) -> None:
    with pytest.raises(NotFound):
        receipt(mill, "nope")


def test_the_receipt_over_http(api: Api) -> None:
    held = api.a_running_step()
    build_id = held.claim["buildId"]

    said = api.post(f"/api/builds/{build_id}/cancel", status=202)
    assert api.post(f"/api/builds/{build_id}/cancel", status=202) == said
    cancel_id = said["cancelId"]
    before = api.get(f"/api/cancels/{cancel_id}")
    assert held.complete("failed", reason="cancelled").status_code == 200
    body = {"termAgeS": 2, "deadAgeS": 1.5, "cleanedAgeS": 0, "leftovers": []}
    assert held.post("cleaned", body).json() == {"ok": True}
    after = api.get(f"/api/cancels/{cancel_id}")

    assert before.items() >= {"id": cancel_id, "buildId": build_id, "state": "running"}.items()
    assert before["steps"][0].items() >= {"state": "running", "confirmed": False, "leftovers": []}.items()
    assert not {"termAt", "deadAt", "cleanedAt"} & before["steps"][0].keys()
    assert (after["state"], after["confirmed"]) == ("done", True)
    assert after["steps"][0].keys() == {
        *("stepId", "name", "attempt", "runnerId", "state", "requestedAt"),
        *("termAt", "deadAt", "cleanedAt", "confirmed", "leftovers"),
    }


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({}, "cleanedAgeS"),
        ({"cleanedAgeS": -1}, "cleanedAgeS"),
        ({"cleanedAgeS": 1e300}, "cleanedAgeS"),
        ({"cleanedAgeS": "0"}, "cleanedAgeS"),
        ({"cleanedAgeS": 0, "termAgeS": True}, "termAgeS"),
        ({"cleanedAgeS": 0, "leftovers": ["x"] * 101}, "leftovers"),
        ({"cleanedAgeS": 0, "leftovers": ["x" * 513]}, "leftovers[0]"),
        ({"cleanedAgeS": 0, "when": 1}, "when"),
    ],
)
def test_a_word_that_cannot_be_is_refused_and_named(api: Api, body: dict[str, Any], where: str) -> None:
    answer = api.a_running_step().post("cleaned", body)

    assert answer.status_code == 400
    assert [fault["path"] for fault in answer.json()["details"]] == [where]


def test_an_unknown_step_or_receipt_is_404(api: Api) -> None:
    held = api.a_running_step()

    answer = api.client.post("/api/runner/nope/cleaned", json={"cleanedAgeS": 0}, headers=held.headers)

    assert answer.status_code == 404
    assert api.get("/api/cancels/nope", status=404)["code"] == "not_found"


def test_a_step_that_failed_with_its_runner_is_on_the_receipt_of_a_later_cancel(later: Mill) -> None:
    later.a_build([a_step("a", exclusive=True), a_step("b")])
    held = {one.claim.name: one for one in later.acquire(later.a_runner(), slots=1)}
    later.start(held["a"])
    for _ in range(6):
        later.clock.advance(60)
        later.expire()
    assert later.step(held["a"].step_id).reason == "runner_lost"

    cancel_id = cancelled(later, held["a"])

    view = receipt(later, cancel_id)
    assert [(step.row.name, step.state, step.is_confirmed) for step in view.steps] == [
        ("a", "failed", False),
        ("b", "cancelled", True),
    ]
    assert not view.is_done
    clean(later, held["a"])
    assert (receipt(later, cancel_id).is_done, receipt(later, cancel_id).is_confirmed) == (True, True)


def test_a_step_that_was_ended_by_force_is_on_the_receipt_of_a_later_cancel(later: Mill) -> None:
    later.a_build([a_step("a", timeoutSeconds=10), a_step("b")])
    (held,) = later.acquire(later.a_runner(), slots=1)
    later.start(held)
    for _ in range(40):
        later.clock.advance(30)
        later.heartbeat(held.runner, held)
        later.expire()
    assert (later.step(held.step_id).state, later.attempts(held.step_id)[0].outcome) == ("failed", "forced")

    view = receipt(later, cancelled(later, held))

    assert [(step.row.name, step.state, step.is_confirmed) for step in view.steps] == [
        ("a", "failed", False),
        ("b", "cancelled", True),
    ]


def test_what_has_been_cleaned_up_before_the_cancel_is_not_on_its_receipt(later: Mill) -> None:
    later.a_build([a_step("a", exclusive=True), a_step("b")])
    (held,) = later.acquire(later.a_runner(), slots=1)
    later.start(held)
    later.clock.advance(400)
    later.expire()
    clean(later, held)

    view = receipt(later, cancelled(later, held))

    assert [step.row.name for step in view.steps] == ["b"]
