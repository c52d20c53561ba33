"""What attempts tell goes at once while few do, and together while many do; each has its own answer."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from runner.errors import LeaseLost, LogRewind, Refused, Unreachable
from runner.proof import Proof
from runner.reporter import MOST_LOG_TOGETHER, MOST_OUTPUTS_TOGETHER, MOST_UNDER_WAY, Report, Reporter
from shared.protocol import MAX_REPORTS, ArtifactEntry, Completed, Completion, Start, StartAnswer

GO = StartAnswer(action="go", timeout_s=60, grace_s=10)
DONE = Completion(status="success", log_size=0)


def a_proof(number):
    return Proof(f"step-{number}", 1, f"lease-{number}")


def until(look, timeout_s=10):
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Line:
    """Requests wait here until the line is open; `together` says what a group is answered with."""

    def __init__(self, together=None):
        self.opened = threading.Event()
        self.alone, self.groups = [], []
        self._together = together or (lambda reports: [GO] * len(reports))
        self.reporter = Reporter(self._send_one, self._send_all)

    def _send_one(self, proof, said):
        self.alone.append(proof.step_id)
        assert self.opened.wait(10)
        if proof.step_id == "step-lost":
            raise LeaseLost("not ours any more")
        return GO

    def _send_all(self, reports):
        self.groups.append([report.proof.step_id for report in reports])
        return self._together(reports)

    def tell(self, number, said=None):
        return self.reporter.tell(a_proof(number), said or Start())


def outcome(future):
    return future.exception(10) or future.result(10)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(200) as pool:
        yield pool


def saturated(line, pool):
    """As many requests are under way as may be."""
    futures = [pool.submit(line.tell, number) for number in range(MOST_UNDER_WAY)]
    until(lambda: len(line.alone) == MOST_UNDER_WAY)
    return futures


def waiting(line, pool, *numbers, said=None):
    futures = []
    for count, number in enumerate(numbers, 1):
        futures.append(pool.submit(line.tell, number, said))
        until(lambda count=count: len(line.reporter._waiting) == count)
    return futures


def test_as_long_as_few_have_something_to_tell_each_goes_alone(pool):
    line = Line()
    line.opened.set()

    assert [line.tell(number) for number in range(10)] == [GO] * 10
    assert line.groups == []


def test_what_had_to_wait_goes_together(pool):
    line = Line()
    first = saturated(line, pool)

    later = waiting(line, pool, 10, 11, 12)
    line.opened.set()

    assert [outcome(one) for one in first + later] == [GO] * 7
    assert line.groups == [["step-10", "step-11", "step-12"]]


def test_each_has_its_own_answer_or_error(pool):
    ended = Completed(success=True, step_status="SUCCESS", build_complete=False)
    line = Line(lambda reports: [ended, LeaseLost("not ours"), LogRewind(7)])
    saturated(line, pool)

    later = waiting(line, pool, 10, 11, 12)
    line.opened.set()

    found = [outcome(one) for one in later]
    assert found[0] is ended
    assert isinstance(found[1], LeaseLost)
    assert isinstance(found[2], LogRewind)


def test_the_error_of_one_that_went_alone_is_its_own(pool):
    line = Line()
    lost, *others = waiting_at_once = [pool.submit(line.tell, name) for name in ("lost", 1, 2)]
    until(lambda: len(line.alone) == len(waiting_at_once))
    line.opened.set()

    assert isinstance(outcome(lost), LeaseLost)
    assert [outcome(one) for one in others] == [GO, GO]


def test_a_coordinator_that_is_away_is_away_for_all_of_them(pool):
    def away(reports):
        raise Unreachable("no route")

    line = Line(away)
    saturated(line, pool)

    later = waiting(line, pool, 10, 11)
    line.opened.set()

    assert all(isinstance(outcome(one), Unreachable) for one in later)
    assert (
        line.alone == [f"step-{number}" for number in sorted(range(MOST_UNDER_WAY))] or len(line.alone) == 4
    )


@pytest.mark.parametrize(
    "error",
    [
        LeaseLost("nothing here"),
        Refused("not so", status=413, code="too_large"),
        LogRewind(3),
        RuntimeError("foreseen by nobody"),
    ],
)
def test_a_refusal_of_all_is_nobodys_and_each_is_told_alone(pool, error):
    def refuse(reports):
        raise error

    line = Line(refuse)
    saturated(line, pool)

    later = waiting(line, pool, 10, 11)
    line.opened.set()

    assert [outcome(one) for one in later] == [GO, GO]
    assert sorted(line.alone[MOST_UNDER_WAY:]) == ["step-10", "step-11"]


def test_an_older_coordinator_is_asked_once_and_then_told_as_it_was_before(pool):
    def no_such_method(reports):
        raise Refused("405", status=405, code="method_not_allowed")

    line = Line(no_such_method)
    saturated(line, pool)
    later = waiting(line, pool, 10, 11)
    line.opened.set()
    assert [outcome(one) for one in later] == [GO, GO]
    line.opened.clear()
    line.alone.clear()

    futures = [pool.submit(line.tell, number) for number in range(3 * MOST_UNDER_WAY)]
    until(lambda: len(line.alone) == 3 * MOST_UNDER_WAY)  # at once, as many as there are
    line.opened.set()

    assert [outcome(one) for one in futures] == [GO] * 3 * MOST_UNDER_WAY
    assert line.groups == [["step-10", "step-11"]]


def many_outputs():
    entries = [
        ArtifactEntry(path=f"f{number}", type="directory") for number in range(MOST_OUTPUTS_TOGETHER + 1)
    ]
    return DONE.model_copy(update={"artifacts": entries})


@pytest.mark.parametrize(
    "said", [many_outputs(), DONE.model_copy(update={"log_size": MOST_LOG_TOGETHER + 1})]
)
def test_what_takes_long_keeps_nobody_waiting(pool, said):
    line = Line()
    saturated(line, pool)

    long = pool.submit(line.tell, 10, said)
    until(lambda: "step-10" in line.alone)
    line.opened.set()

    assert outcome(long) == GO
    assert line.groups == []


def test_no_more_go_together_than_the_coordinator_takes(pool):
    line = Line()
    saturated(line, pool)

    later = waiting(line, pool, *range(100, 100 + MAX_REPORTS + 1))
    line.opened.set()

    assert [outcome(one) for one in later] == [GO] * (MAX_REPORTS + 1)
    assert len(line.groups[0]) == MAX_REPORTS


# --- what the client makes of it ----------------------------------------------------------------------


def sent_together(client, *said):
    """What becomes of several that go together, each the answer or the error."""
    return client._send_reports([Report(a_proof(number), one) for number, one in enumerate(said)])


def refused(status, code, **more):
    return {"status": status, "refused": {"error": "a sentence", "code": code, "details": [], **more}}


SAID = {"action": "go", "timeoutS": 60, "graceS": 10}
ENDED = {"success": True, "stepStatus": "SUCCESS", "buildComplete": False}


def test_each_report_carries_its_proof_and_gets_the_answer_in_its_place(network, client):
    network.post("/api/runner/reports").respond(
        json={
            "starts": [{"status": 200, "answer": SAID}, refused(409, "stale_attempt")],
            "completions": [{"status": 200, "answer": ENDED}],
        }
    )

    found = sent_together(client, Start(container="c"), DONE, Start())

    assert (found[0].action, found[1].step_status) == ("go", "SUCCESS")
    assert isinstance(found[2], LeaseLost)
    sent = network.calls.last.request
    assert sent.headers["authorization"] == "Bearer the-secret"
    body = json.loads(sent.content)
    assert body["starts"][0] == {
        "container": "c",
        "node": "",
        "imageDigest": "",
        "stepId": "step-0",
        "attempt": 1,
        "lease": "lease-0",
    }
    assert body["completions"][0]["stepId"] == "step-1"
    assert body["completions"][0]["logSize"] == 0


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (refused(409, "stale_attempt"), LeaseLost),
        (refused(404, "not_found"), LeaseLost),
        (refused(409, "log_incomplete", size=7), LogRewind),
        (refused(409, "outputs_incomplete"), Refused),
        (refused(400, "invalid", details=[{"path": "exitCode", "reason": "must be 0"}]), Refused),
        (refused(503, "unavailable", retryAfter=7), Unreachable),
        (refused(500, "internal"), Unreachable),
        ({"status": 409}, Unreachable),
    ],
)
def test_a_refusal_in_a_report_means_what_it_means_alone(network, client, answer, kind):
    network.post("/api/runner/reports").respond(json={"starts": [], "completions": [answer]})

    (found,) = sent_together(client, DONE)

    assert type(found) is kind
    if kind is Unreachable:
        assert found.retry_after_s == answer.get("refused", {}).get("retryAfter")
        assert found.is_back is not None


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, json={"starts": [], "completions": []}),
        httpx.Response(200, json={"starts": [{"status": 200, "answer": SAID}], "completions": []}),
        httpx.Response(200, text="<html>"),
        httpx.Response(502, text="<html>"),
    ],
)
def test_an_answer_that_leaves_somebody_out_is_none(network, client, answer):
    network.post("/api/runner/reports").mock(return_value=answer)

    with pytest.raises(Unreachable):
        sent_together(client, DONE)
