"""A cancelled step ends soon wherever it is, leaves nothing behind, and who cancelled it gets the proof."""
# ruff: noqa: F811 - fixtures are imported by their names

import json
import os
import subprocess
import threading
import time

import httpx
import pytest

from runner import cleaning
from runner.attempt import Attempt
from runner.deadline import Moment
from runner.journal import Journal, JournalPhase, attempt_dir
from runner.mounts import mounts_below, unmount
from runner.proof import Proof
from runner.step_run import StepRun
from shared.protocol import Limits
from tests.runner import test_step_run
from tests.runner.claims import a_claim
from tests.runner.state_folder import needs_root
from tests.runner.test_step_run import attempt, means, run, silent_server, wishes  # noqa: F401
from tests.trip.faults import verb_of

PROMPT_S = 5.0
AN_INPUT = {"step": "s", "path": "in", "type": "file", "sha256": "a" * 64, "size": 1}


class Coordinator(test_step_run.Coordinator):
    """Keeps what it is told of attempts that are gone, in the order in which things were told."""

    def __init__(self):
        super().__init__()
        self.cleaned = []

    def __call__(self, request):
        if verb_of(request.method, request.url.path) == "cleaned":
            assert request.headers["X-Attempt"] == "1"
            assert request.headers["X-Lease"] == "the-lease"
            self.cleaned.append(json.loads(request.content))
        return super().__call__(request)


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def begun():
    """What a test's own threads do; all have ended when the test has."""
    threads = []

    def begin(work):
        thread = threading.Thread(target=work, daemon=True)
        threads.append(thread)
        thread.start()

    yield begin
    for thread in threads:
        thread.join(20)


def until(look, timeout_s=20):
    ends = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < ends, "not seen in time"
        time.sleep(0.01)


def assert_proved(coordinator, state):
    (said,) = coordinator.cleaned
    assert said.get("leftovers", []) == []
    assert 0 <= said["cleanedAgeS"] <= said["deadAgeS"] < 60
    assert not (state / "a" / "step-1").exists()
    assert os.listdir(state / "processes") == []
    assert mounts_below(state / "a") == []
    return said


def journal_of(state):
    return Journal.load(attempt_dir(state, "step-1", 1))


# Each phase: how a cancel arrives in the midst of it, and what the step is.


def in_checkout(coordinator, attempt, state, begin, silent):
    address, met = silent

    def tell():
        assert met.wait(20)
        attempt.cancel("cancelled")

    begin(tell)
    return {"source": {"repo_url": address}}


def in_restoring(coordinator, attempt, state, begin, silent):
    def tell():
        attempt.cancel("cancelled")
        return httpx.Response(503)

    coordinator.answers["get_blob"] = [tell]
    return {"inputs": [AN_INPUT]}


def in_created(coordinator, attempt, state, begin, silent):
    def tell():
        attempt.cancel("cancelled")
        return httpx.Response(503)

    coordinator.answers["start"] = [tell, *[httpx.Response(503)] * 100]
    return {}


def in_going(coordinator, attempt, state, begin, silent):
    def tell():
        attempt.cancel("cancelled")
        return httpx.Response(200, json={"action": "go", "timeoutS": 60, "graceS": 1})

    coordinator.answers["start"] = [tell]
    return {}


def in_running(coordinator, attempt, state, begin, silent):
    def tell():
        until(lambda: (state / "ran").exists())
        attempt.cancel("cancelled")

    begin(tell)
    return {"script": f"touch {state}/ran; sleep 60"}


def in_collecting(coordinator, attempt, state, begin, silent):
    def tell():
        until(lambda: (journal := journal_of(state)) and journal.phase is JournalPhase.COLLECTING)
        attempt.cancel("cancelled")

    begin(tell)
    return {"script": "mkdir o; cd o; seq 1 15000 | xargs -n 500 touch", "output_paths": ["o"]}


def in_uploading(coordinator, attempt, state, begin, silent):
    def tell():
        attempt.cancel("cancelled")
        return httpx.Response(404)

    coordinator.answers["head_blob"] = [tell]
    return {"script": "seq 1 9000000 > out", "output_paths": ["out"]}


def in_completing(coordinator, attempt, state, begin, silent):
    def tell():
        attempt.cancel("cancelled")
        answer = {"success": False, "stepStatus": "CANCELLED", "buildComplete": True}
        coordinator.answers["complete"] = [httpx.Response(200, json=answer)]
        return httpx.Response(503)

    coordinator.answers["complete"] = [tell]
    return {}


PHASES = [
    in_checkout,
    in_restoring,
    in_created,
    in_going,
    in_running,
    in_collecting,
    in_uploading,
    in_completing,
]


@pytest.mark.parametrize("wishes", [{"git_protocols": "http", "disk_reserve_mb": 0}])
@pytest.mark.parametrize("phase", PHASES, ids=[phase.__name__ for phase in PHASES])
def test_a_cancel_is_heard_in_every_phase_and_leaves_nothing(
    run,
    coordinator,
    attempt,
    state,
    begun,
    silent_server,
    phase,
):
    heard = []
    really = attempt.cancel

    def cancel(reason):
        heard.append(time.monotonic())
        really(reason)

    attempt.cancel = cancel
    wish = phase(coordinator, attempt, state, begun, silent_server)
    wish.setdefault("script", f"touch {state}/ran")

    run(**wish)

    assert heard, "this phase was never seen"
    assert time.monotonic() - heard[0] < PROMPT_S
    assert_proved(coordinator, state)
    assert coordinator.asked.index("complete") < coordinator.asked.index("cleaned")
    if phase is not in_completing:
        assert [said["reason"] for said in coordinator.completions] == ["cancelled"]
    if phase is in_collecting:
        assert b"uploading" not in coordinator.log
    if phase in PHASES[:4]:
        assert not (state / "ran").exists()


def test_a_cancel_behind_an_accepted_completion_changes_nothing(run, coordinator, attempt, state):
    def accept():
        attempt.cancel("cancelled")  # its heartbeat was answered a moment too late
        return httpx.Response(200, json={"success": True, "stepStatus": "SUCCESS", "buildComplete": True})

    coordinator.answers["complete"] = [accept]

    run()

    assert [said["status"] for said in coordinator.completions] == ["success"]
    assert coordinator.cleaned == []
    assert not (state / "a" / "step-1").exists()


def test_a_cancel_that_only_the_coordinator_knew_of_is_proved_too(run, coordinator, state):
    answer = {"success": False, "stepStatus": "CANCELLED", "buildComplete": True}
    coordinator.answers["complete"] = [httpx.Response(200, json=answer)]

    run()

    assert_proved(coordinator, state)


@pytest.mark.parametrize("script", ["true", "exit 3"])
def test_nobody_is_told_of_the_cleaning_where_nobody_waits_for_it(run, coordinator, script):
    run(script)

    assert "cleaned" not in coordinator.asked


def test_an_attempt_that_was_given_up_is_killed_and_told_as_clean(run, coordinator, attempt, state, begun):
    def tell():
        until(lambda: (state / "pid").exists() and (state / "pid").read_text())
        attempt.abandon()

    begun(tell)

    run(f"trap '' TERM; echo $$ > {state}/pid; while :; do sleep 0.1; done")

    assert coordinator.completions == []
    assert_proved(coordinator, state)
    assert not os.path.exists(f"/proc/{(state / 'pid').read_text().strip()}")


def test_the_times_of_an_end_tell_how_it_went(run, coordinator, attempt, state, begun):
    def tell():
        until(lambda: (state / "ran").exists())
        attempt.cancel("cancelled")

    begun(tell)

    run(f"trap 'sleep 1; exit 9' TERM; touch {state}/ran; while :; do sleep 0.05; done")

    said = assert_proved(coordinator, state)
    assert 1 <= said["termAgeS"] - said["deadAgeS"] < 3
    assert coordinator.completions[0]["exitCode"] == 9


@pytest.mark.parametrize(
    "answer", [httpx.ConnectError("away"), httpx.Response(503), httpx.Response(200, text="x")]
)
def test_the_proof_is_told_until_it_is_heard(run, coordinator, attempt, state, answer):
    attempt.cancel("cancelled")
    coordinator.answers["cleaned"] = [answer]

    run()

    assert len(coordinator.cleaned) == (1 if isinstance(answer, httpx.Response) and answer.is_success else 2)
    assert not (state / "a" / "step-1").exists()


@pytest.mark.parametrize(("status", "code"), [(404, "not_found"), (409, "stale_attempt"), (400, "invalid")])
def test_a_proof_that_nobody_wants_is_not_told_again(run, coordinator, attempt, state, status, code):
    attempt.cancel("cancelled")
    coordinator.answers["cleaned"] = [test_step_run.refusal(status, code)]

    run()

    assert len(coordinator.cleaned) == 1
    assert not (state / "a" / "step-1").exists()


def test_a_runner_that_dies_before_the_proof_was_heard_tells_it_in_its_next_life(
    run,
    coordinator,
    attempt,
    state,
    means,
    begun,
):
    def end_this_life():
        attempt.shut_down()
        return httpx.Response(503)

    def tell():
        until(lambda: (state / "ran").exists())
        attempt.cancel("cancelled")

    begun(tell)
    coordinator.answers["cleaned"] = [end_this_life, *[httpx.Response(503)] * 30]
    journal = run(f"echo x >> {state}/ran; sleep 60")
    assert journal.phase is JournalPhase.CLEANING
    assert sorted(path.name for path in journal.folder.iterdir()) == ["journal.json"]
    first = coordinator.cleaned[0]
    coordinator.answers.clear()
    coordinator.cleaned.clear()
    time.sleep(0.2)

    StepRun(means, journal_of(state), Attempt(Proof("step-1", 1, "the-lease"), is_over=True)).run()

    said = assert_proved(coordinator, state)
    for age in ("termAgeS", "deadAgeS", "cleanedAgeS"):
        assert said[age] >= first[age] + 0.2
    assert len(coordinator.completions) == 1
    assert (state / "ran").read_text() == "x\n"


def test_who_takes_over_after_term_gives_no_second_grace_and_keeps_the_reason(
    run,
    coordinator,
    attempt,
    state,
    means,
    begun,
):
    def kill_this_life():
        until(lambda: (state / "ran").exists())
        attempt.cancel("cancelled")
        until(lambda: (state / "term").exists())
        attempt.abandoned.set()  # the nearest to a kill: the waiting ends, and nothing more is done

    limits = Limits(timeout_s=60, grace_s=2)
    script = f"trap 'echo x >> {state}/term' TERM; touch {state}/ran; while :; do sleep 0.05 || :; done"
    folder = attempt_dir(state, "step-1", 1)
    journal = Journal.create(folder, a_claim(script, limits=limits).model_dump(mode="json"))
    begun(kill_this_life)
    dying = StepRun(means, journal, attempt)
    dying._cleaning.prove = lambda free: None  # what is dead cleans nothing up
    dying.run()
    assert journal_of(state).data["ending"]["reason"] == "cancelled"
    term = Moment.recorded(journal_of(state).data["term"])

    StepRun(means, journal_of(state), Attempt(Proof("step-1", 1, "the-lease"))).run()

    assert 2 <= term.age_s() < 4
    assert [said["reason"] for said in coordinator.completions] == ["cancelled"]
    assert not (state / "a" / "step-1").exists()


@needs_root
def test_what_cannot_be_removed_is_named_and_told_again_when_it_has_gone(
    run,
    coordinator,
    attempt,
    state,
    begun,
    monkeypatch,
):
    monkeypatch.setattr(cleaning, "PATIENCE_S", 0.2)
    held = attempt_dir(state, "step-1", 1) / "held"

    def tell():
        until(lambda: (journal := journal_of(state)) and journal.phase is JournalPhase.RUNNING)
        held.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", str(held)], check=True)
        attempt.cancel("cancelled")
        until(lambda: coordinator.cleaned)
        unmount(held)

    begun(tell)

    run("sleep 60")

    first, last = coordinator.cleaned
    assert first["leftovers"] == [f"file {held}", f"mount {held}"]
    assert last["leftovers"] == []
    assert not (state / "a" / "step-1").exists()


# The grace


ENDS = {
    "cancelled": Limits(timeout_s=60, grace_s=1),
    "timeout": Limits(timeout_s=1, grace_s=1),
    "no_output": Limits(timeout_s=60, no_output_s=1, grace_s=1),
}


@pytest.mark.parametrize("reason", ENDS)
@pytest.mark.parametrize("grace_s", [1, 20])
def test_the_grace_of_the_step_is_what_it_gets_whatever_ends_it(
    run,
    coordinator,
    attempt,
    state,
    begun,
    reason,
    grace_s,
):
    limits = ENDS[reason].model_copy(update={"grace_s": grace_s})
    answer = {"action": "go", "timeoutS": limits.timeout_s, "graceS": limits.grace_s}
    coordinator.answers["start"] = [httpx.Response(200, json=answer)]

    def tell():
        until(lambda: (state / "ran").exists())
        attempt.cancel("cancelled")

    if reason == "cancelled":
        begun(tell)

    run(
        f"trap 'sleep 2; echo saved > {state}/saved; exit 7' TERM; touch {state}/ran; "
        "while :; do sleep 0.05; done",
        limits=limits,
    )

    (said,) = coordinator.completions
    assert said["reason"] == reason
    assert (state / "saved").exists() == (grace_s == 20)
    assert (said["exitCode"] == 7) == (grace_s == 20)
