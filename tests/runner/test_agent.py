"""The loop: what is taken, adopted, released and left, by a coordinator that answers as it is told."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from runner.errors import EngineUnavailable, StepError
from runner.executor.base import Leftover
from runner.health import Tried
from runner.journal import Journal, JournalPhase, attempt_dir
from runner.state_dir import PendingRequest
from shared.protocol import Limits
from shared.reasons import Reason
from tests.runner.claims import a_claim
from tests.runner.runners import an_agent
from tests.runner.test_step_run import Coordinator, refusal


class Polled(Coordinator):
    """Hands out `claims`, one list for each poll, and orders for what it is told of."""

    def __init__(self):
        super().__init__()
        self.claims = []
        self.orders = {}
        self.secrets = {}
        self.requests = []
        self.resumed = []
        self.heartbeats = []

    def __call__(self, request):
        if request.url.path.endswith("/acquire"):
            self.requests.append(json.loads(request.content)["requestId"])
        return super().__call__(request)

    def _yes(self, verb, request):
        if verb == "acquire":
            claims = self.claims.pop(0) if self.claims else []
            if not claims:
                return httpx.Response(204)
            return httpx.Response(
                200, json={"claims": [one.model_dump(mode="json", by_alias=True) for one in claims]}
            )
        if verb in ("resume", "heartbeat"):
            told = json.loads(request.content).get("attempts", [])
            if verb == "heartbeat":
                self.heartbeats.append(request.content)
            if verb == "resume":
                self.resumed = [one["stepId"] for one in told]
            orders = [
                {
                    "stepId": one["stepId"],
                    "attempt": one["attempt"],
                    "action": self.orders.get(one["stepId"], "continue"),
                    "secrets": self.secrets.get(one["stepId"], {}) if verb == "resume" else {},
                }
                for one in told
            ]
            return httpx.Response(200, json={"attempts": orders, "next": 0.5})
        return super()._yes(verb, request)


@pytest.fixture
def coordinator():
    return Polled()


@pytest.fixture
def new_agent(state, coordinator):
    def new(**settings):
        return an_agent(state, coordinator, once=True, **settings)

    return new


def live(agent):
    """Run it to its end, in a thread of its own with a limit."""
    thread = threading.Thread(target=agent.run, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()


def test_it_takes_runs_and_leaves(new_agent, coordinator):
    coordinator.claims = [[a_claim(step_id="step-1"), a_claim(step_id="step-2")]]

    live(new_agent())

    assert coordinator.asked[0] == "resume"
    assert coordinator.asked.count("complete") == 2
    assert coordinator.asked[-1] == "bye"


def test_each_answered_poll_is_followed_by_one_with_a_new_id(new_agent, coordinator, state):
    coordinator.claims = [[a_claim()], []]

    live(new_agent())

    assert len(set(coordinator.requests)) == len(coordinator.requests)
    assert PendingRequest(state).find() is None


def test_a_poll_without_an_answer_is_repeated_under_its_id(new_agent, coordinator):
    coordinator.answers["acquire"] = [httpx.ReadError("lost"), httpx.Response(502, text="<html>")]
    coordinator.claims = [[a_claim()]]

    live(new_agent())

    first, second, third, *later = coordinator.requests
    assert first == second == third
    assert first not in later
    assert coordinator.asked.count("complete") == 1


def test_a_claim_that_is_heard_twice_runs_once(new_agent, coordinator, state):
    claim = a_claim(f"echo x >> {state}/ran; sleep 0.3")
    coordinator.claims = [[claim], [claim]]

    live(new_agent(slots=2))

    assert (state / "ran").read_text() == "x\n"


def test_what_a_former_life_held_is_gone_on_with_or_thrown_away_as_told(new_agent, coordinator, state):
    for step_id in ("goes-on", "is-over"):
        folder = attempt_dir(state, step_id, 1)
        claim = a_claim(f"echo {step_id} >> {state}/ran", step_id=step_id)
        Journal.create(folder, claim.model_dump(mode="json"))
    coordinator.orders = {"is-over": "abandon"}

    live(new_agent())

    assert sorted(coordinator.resumed) == ["goes-on", "is-over"]
    assert (state / "ran").read_text() == "goes-on\n"
    assert coordinator.asked.count("complete") == 1
    assert list((state / "a").glob("*/*")) == []


def test_a_process_that_was_superseded_steps_aside_without_a_goodbye(new_agent, coordinator):
    coordinator.answers["acquire"] = [refusal(409, "session_superseded")]

    live(new_agent())

    assert "bye" not in coordinator.asked


def test_one_that_is_told_to_stop_before_it_is_heard_ends_all_the_same(new_agent, coordinator):
    coordinator.answers["resume"] = [httpx.ConnectError("away") for _ in range(1000)]
    agent = new_agent()
    threading.Timer(0.2, agent.drain).start()

    live(agent)

    assert "acquire" not in coordinator.asked


def test_a_journal_whose_claim_is_not_understood_stops_nothing_else(new_agent, coordinator, state):
    known = a_claim(f"echo goes-on >> {state}/ran", step_id="goes-on").model_dump(mode="json")
    Journal.create(attempt_dir(state, "goes-on", 1), known)
    Journal.create(attempt_dir(state, "of-another-age", 1), {**known, "attempt": "the first"})

    live(new_agent())

    assert coordinator.resumed == ["goes-on"]
    assert (state / "ran").read_text() == "goes-on\n"
    assert not (attempt_dir(state, "of-another-age", 1) / "journal.json").exists()


def test_what_an_attempt_could_not_clean_up_is_cleaned_up_while_the_runner_lives(
    new_agent, coordinator, state, monkeypatch
):
    agent = new_agent()
    folder = attempt_dir(state, "step-1", 1)
    destroy = agent._means.executor.destroy
    failed = threading.Event()

    def fail_once(job):
        if not failed.is_set():
            failed.set()
            raise EngineUnavailable("the engine is away")
        destroy(job)

    monkeypatch.setattr(agent._means.executor, "destroy", fail_once)
    given = httpx.Response(200, json={"claims": [a_claim().model_dump(mode="json", by_alias=True)]})
    coordinator.answers["acquire"] = [given, lambda: wait_until_gone(folder)]

    live(agent)

    assert failed.is_set()
    assert not folder.exists()


def test_what_a_shutdown_leaves_for_the_next_process_is_not_cleaned_up(new_agent, coordinator, state):
    agent = new_agent()
    folder = attempt_dir(state, "step-1", 1)

    def stop_while_the_coordinator_is_away():
        agent.shut_down()
        return httpx.Response(503)

    coordinator.claims = [[a_claim()]]
    coordinator.answers["complete"] = [stop_while_the_coordinator_is_away] * 1000

    live(agent)
    agent._janitor._remove_what_nobody_holds()

    assert folder.exists()


def wait_until_gone(folder):
    """A poll during which the runner has time to clean up."""
    until = time.monotonic() + 10
    while folder.exists() and time.monotonic() < until:
        time.sleep(0.02)
    return httpx.Response(204)


@pytest.mark.threat("F03")
def test_no_step_is_taken_while_the_disk_runs_short(new_agent, coordinator):
    coordinator.claims = [[a_claim()]]

    live(new_agent(disk_reserve_mb=2**40))

    assert "acquire" not in coordinator.asked
    assert coordinator.claims, "the step waits for another runner, or for room"


def test_a_runner_whose_machine_keeps_failing_takes_no_more_and_says_so(new_agent, coordinator, monkeypatch):
    agent = new_agent(slots=1)
    monkeypatch.setattr(agent._means.executor, "pull", no_engine)
    coordinator.claims = [[a_claim(step_id=f"step-{number}")] for number in range(5)]

    live(agent)

    told = [json.loads(body) for body in coordinator.heartbeats]
    assert coordinator.asked.count("complete") == 3
    assert len(coordinator.claims) == 2, "the others are for machines that work"
    assert told[-1]["pausedForS"] > 0
    assert "internal" in told[-1]["pauseReason"]


def no_engine(image, *, deadline_s, progress):
    raise StepError(Reason.INTERNAL, "the machine is broken")


def test_a_claim_that_arrives_when_the_pause_has_begun_goes_back(new_agent, coordinator):
    agent = new_agent()

    def fail_meanwhile():
        for number in range(3):
            agent._health.note_completion({"status": "failed", "reason": "disk_full"}, Tried(str(number)))
        return httpx.Response(
            200, json={"claims": [a_claim(step_id="late").model_dump(mode="json", by_alias=True)]}
        )

    coordinator.answers["acquire"] = [fail_meanwhile]

    live(agent)

    assert "release" in coordinator.asked
    assert "complete" not in coordinator.asked


@pytest.mark.threat("G08")
def test_secrets_are_in_the_claim_and_never_in_the_journal(new_agent, coordinator, state):
    canary = "canary-1123581321"
    claim = a_claim('test "$TOKEN" && echo "$TOKEN"', secret_names=["TOKEN"], secrets={"TOKEN": canary})
    coordinator.claims = [[claim]]
    journals = []

    def look():
        journals.append((attempt_dir(state, "step-1", 1) / "journal.json").read_text())
        return coordinator._yes("start", None)

    coordinator.answers["start"] = [look]
    new_agent().run()

    assert coordinator.completions[0]["status"] == "success"
    assert b"\n***\n" in coordinator.log
    assert canary not in journals[0] and '"TOKEN"' in journals[0]


@pytest.mark.threat("G10")
def test_an_adopted_attempt_is_masked_with_what_resume_hands_out_again(new_agent, coordinator, state):
    canary = "canary-1123581321"
    folder = attempt_dir(state, "step-1", 1)
    claim = a_claim("echo", secret_names=["TOKEN"])
    Journal.create(folder, claim.model_dump(mode="json", exclude={"secrets"}))
    coordinator.secrets = {"step-1": {"TOKEN": canary}}
    (folder / "script.sh").write_text('echo "$TOKEN"\n')

    new_agent().run()

    assert coordinator.completions[0]["status"] == "success"
    assert b"***\n" in coordinator.log
    assert canary.encode() not in coordinator.log


def a_leftover_that_withstands(agent, monkeypatch, *, asked):
    """The engine shows one container of a former life, and cannot delete it."""

    def withstand(leftover):
        asked.append(leftover.name)
        raise EngineUnavailable("the container cannot be removed")

    leftover = Leftover("stubborn", "old-step", 1, True)
    monkeypatch.setattr(agent._means.executor, "leftovers", lambda: [leftover])
    monkeypatch.setattr(agent._means.executor, "remove_leftover", withstand)


def test_a_container_that_cannot_be_removed_keeps_the_runner_from_nothing(
    new_agent, coordinator, state, monkeypatch
):
    agent, asked = new_agent(), []
    a_leftover_that_withstands(agent, monkeypatch, asked=asked)
    claim = a_claim(f"echo goes-on >> {state}/ran", step_id="goes-on")
    Journal.create(attempt_dir(state, "goes-on", 1), claim.model_dump(mode="json"))
    coordinator.claims = [[a_claim(step_id="new")]]

    live(agent)

    assert (state / "ran").read_text() == "goes-on\n"
    assert coordinator.asked.count("complete") == 2
    assert asked == ["stubborn"]


def test_nothing_of_a_former_life_is_removed_before_the_coordinator_was_asked(
    new_agent, coordinator, monkeypatch
):
    """The folder may be a copy, and what it names may be at work for another process."""
    agent, asked = new_agent(), []
    a_leftover_that_withstands(agent, monkeypatch, asked=asked)
    coordinator.answers["resume"] = [httpx.ConnectError("away") for _ in range(1000)]
    threading.Timer(0.5, agent.drain).start()

    live(agent)

    assert asked == []


def test_a_claim_whose_name_a_former_life_still_uses_goes_back(new_agent, coordinator, state, monkeypatch):
    monkeypatch.setattr("runner.agent.NO_ROOM_PAUSE_S", 0.0)
    agent, asked = new_agent(), []
    a_leftover_that_withstands(agent, monkeypatch, asked=asked)
    coordinator.claims = [[a_claim(step_id="old-step")]]

    live(agent)

    assert "release" in coordinator.asked
    assert "start" not in coordinator.asked
    assert not attempt_dir(state, "old-step", 1).exists()


def a_gateway_without_a_route():
    return httpx.Response(404, json={"message": "no Route matched with those values"})


def test_a_gateway_that_knows_no_route_kills_no_running_step(new_agent, coordinator, state):
    coordinator.claims = [[a_claim(f"echo tick; sleep 1; echo done >> {state}/ran")]]
    coordinator.answers["log"] = [a_gateway_without_a_route() for _ in range(2)]

    live(new_agent())

    assert (state / "ran").read_text() == "done\n"
    assert coordinator.completions[0]["status"] == "success"


@pytest.mark.parametrize("answer", [a_gateway_without_a_route, lambda: refusal(404, "not_found")])
def test_who_gets_no_orders_asks_again(new_agent, coordinator, answer):
    coordinator.answers["resume"] = [answer() for _ in range(3)]
    coordinator.claims = [[a_claim()]]

    live(new_agent())

    assert coordinator.asked.count("complete") == 1


def test_a_poll_that_is_refused_for_good_is_not_repeated_without_a_pause(new_agent, coordinator):
    agent = new_agent(slots=1)
    agent._once = False

    def begin():
        threading.Timer(2.5, agent.drain).start()
        return refusal(404, "not_found")

    coordinator.answers["acquire"] = [begin, *[refusal(404, "not_found") for _ in range(10_000)]]

    live(agent)

    assert 1 <= len(coordinator.requests) <= 4


def test_a_drain_while_a_claim_is_being_begun_waits_for_its_step(new_agent, coordinator, state, monkeypatch):
    agent = new_agent()
    agent._once = False
    create = Journal.create.__func__

    def slowly(cls, folder, claim, **more):
        agent.drain()
        time.sleep(0.6)  # longer than the main thread needs to see that nothing runs
        return create(cls, folder, claim, **more)

    monkeypatch.setattr(Journal, "create", classmethod(slowly))
    coordinator.claims = [[a_claim(f"echo done >> {state}/ran")]]

    live(agent)

    assert (state / "ran").read_text() == "done\n"
    assert coordinator.asked.count("complete") == 1
    assert coordinator.asked[-1] == "bye"


def test_a_claim_that_arrives_while_it_drains_is_given_back_before_the_goodbye(new_agent, coordinator):
    agent = new_agent()
    agent._once = False

    def late():
        agent.drain()
        time.sleep(0.5)
        return httpx.Response(200, json={"claims": [a_claim().model_dump(mode="json", by_alias=True)]})

    coordinator.answers["acquire"] = [late]

    live(agent)

    assert coordinator.asked.index("release") < coordinator.asked.index("bye")
    assert "start" not in coordinator.asked


@pytest.fixture
def impatient(monkeypatch):
    """Minutes are tenths of a second."""
    monkeypatch.setattr("runner.client.UNWELCOME_RETRY_S", 0.1)
    monkeypatch.setattr("runner.agent.FORGOTTEN_S", 0.3)


def unknown():
    return refusal(401, "unauthenticated")


def test_a_runner_that_stays_forgotten_gives_up_what_it_held_and_ends(
    new_agent, coordinator, state, impatient
):
    for step_id, phase in (("to-run", JournalPhase.CLAIMED), ("to-clean", JournalPhase.CLEANING)):
        claim = a_claim(f"echo x >> {state}/ran", step_id=step_id)
        Journal.create(attempt_dir(state, step_id, 1), claim.model_dump(mode="json")).advance(phase)
    coordinator.answers["resume"] = [unknown() for _ in range(1000)]
    coordinator.answers["cleaned"] = [unknown() for _ in range(1000)]
    agent = new_agent()

    live(agent)

    assert agent.was_forgotten
    assert list((state / "a").glob("*/*")) == []
    assert not (state / "ran").exists()
    assert coordinator.asked.count("resume") >= 2
    assert "complete" not in coordinator.asked and "acquire" not in coordinator.asked


@pytest.mark.parametrize(
    "between",
    [lambda: httpx.ConnectError("away"), lambda: refusal(403, "denied"), lambda: httpx.Response(503)],
)
def test_a_coordinator_that_says_so_with_breaks_is_not_believed(
    new_agent, coordinator, state, impatient, monkeypatch, between
):
    monkeypatch.setattr("runner.agent.FORGOTTEN_S", 0.0)  # the second time in a row is enough
    Journal.create(attempt_dir(state, "step-1", 1), a_claim().model_dump(mode="json"))
    coordinator.answers["resume"] = [unknown(), between(), unknown(), between(), unknown()]
    agent = new_agent()

    live(agent)

    assert not agent.was_forgotten
    assert coordinator.completions[0]["status"] == "success"


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def a_step_that_a_killed_runner_left(state, coordinator, new_agent, script, **fields):
    """The process of its script, once the runner is dead; the script says by `pid` that it runs."""
    coordinator.claims = [[a_claim(script, **fields)]]
    pid = state / "pid"
    child = os.fork()
    if child == 0:
        threading.Thread(target=new_agent().run, daemon=True).start()
        until = time.monotonic() + 20
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    coordinator.claims = []
    return int(pid.read_text())


def test_a_time_limit_holds_after_a_restart_while_the_coordinator_is_away(new_agent, coordinator, state):
    coordinator.answers["start"] = [httpx.Response(200, json={"action": "go", "timeoutS": 2, "graceS": 1})]
    pid = a_step_that_a_killed_runner_left(
        state, coordinator, new_agent, f"echo $$ > {state}/pid; exec sleep 60", limits=Limits(timeout_s=2)
    )
    died = []

    def away_until_it_is_dead():
        if is_alive(pid):
            coordinator.answers["resume"].append(away_until_it_is_dead)
            return httpx.Response(503)
        died.append(pid)
        return httpx.Response(503)

    coordinator.answers["resume"] = [away_until_it_is_dead]

    live(new_agent())

    assert died == [pid], "before the coordinator answered"
    assert coordinator.completions[0]["reason"] == "timeout"


def test_what_is_within_its_limit_runs_on_while_the_coordinator_is_away(new_agent, coordinator, state):
    pid = a_step_that_a_killed_runner_left(
        state, coordinator, new_agent, f"echo $$ > {state}/pid; sleep 3; echo done >> {state}/ran"
    )
    coordinator.answers["resume"] = [httpx.Response(503) for _ in range(4)]

    assert is_alive(pid)
    live(new_agent())

    assert (state / "ran").read_text() == "done\n"
    assert coordinator.completions[0]["status"] == "success"
