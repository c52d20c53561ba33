"""Several starts and completions in one request: each counts, and is answered, as if it had come alone."""

import hashlib
import itertools
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sqlalchemy import update
from sqlmodel import Session

from coordinator.actions import start_step as start_module
from coordinator.actions import take_reports as reports_module
from coordinator.actions.complete_step import Verdict
from coordinator.actions.leased_step import LeaseProof
from coordinator.actions.release_step import release_step
from coordinator.actions.renew_leases import renew_leases
from coordinator.actions.take_reports import Told, take_reports
from coordinator.errors import Unavailable
from coordinator.store import lanes as lanes_module
from coordinator.store.log_files import LogFiles
from coordinator.store.prepared import _Compiled
from coordinator.store.steps import STEPS, touch_steps
from shared.ids import new_id
from shared.protocol import Completion, Heartbeat, Phase, Start, StartAnswer
from tests.factories import ON_POSTGRES, ON_SQLITE, Api, Held, HeldOverHttp, Mill, a_spec, a_step, together

LOG = b"hello\n"
DIGEST = hashlib.sha256(LOG).hexdigest()
_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[0-9:.]+Z?")


@dataclass(frozen=True)
class Situation:
    """An attempt that somebody is about to tell something of."""

    held: HeldOverHttp
    verb: str
    said: dict[str, Any]

    @property
    def proof(self) -> dict[str, Any]:
        claim = self.held.claim
        return {"stepId": claim["stepId"], "attempt": claim["attempt"], "lease": claim["lease"]}


Maker = Callable[[Api, dict[str, str]], Situation]
SUCCESS = {"status": "success", "exitCode": 0, "logSize": 0}


def started(api: Api, runner: dict[str, str], spec: Any = None) -> HeldOverHttp:
    held = api.an_acquired_step(spec, runner)
    assert held.post("start", {"container": "c"}).status_code == 200
    return held


def cancelled(api: Api, held: HeldOverHttp) -> HeldOverHttp:
    api.post(f"/api/builds/{held.claim['buildId']}/cancel", status=202)
    return held


def taken_again(api: Api, runner: dict[str, str]) -> tuple[HeldOverHttp, HeldOverHttp]:
    first = api.an_acquired_step(None, runner)
    assert first.post("release", {"reason": "no room"}).status_code == 200
    (claim,) = api.acquire(runner)
    assert claim["stepId"] == first.step_id
    return first, replace(first, claim=claim)


def with_log(held: HeldOverHttp) -> HeldOverHttp:
    assert held.append(0, LOG).status_code == 200
    return held


def with_blob(held: HeldOverHttp) -> HeldOverHttp:
    assert held.put_blob(DIGEST, LOG).status_code == 201
    return held


def unknown(api: Api, runner: dict[str, str]) -> HeldOverHttp:
    return HeldOverHttp(api.client, {"stepId": new_id(), "attempt": 1, "lease": "x", "buildId": ""}, runner)


def foreign(api: Api, runner: dict[str, str]) -> HeldOverHttp:
    return replace(started(api, api.a_runner()), runner=runner)


FILE = {"path": "out.txt", "type": "file", "size": len(LOG), "sha256": DIGEST}
HANDS_ON = [a_step(outputPaths=["out.txt"])]
TRIES_TWICE = [a_step(retry={"max": 1, "exitCodes": [7]})]
CHAIN = a_spec(first=[], second=["first"])

SITUATIONS: dict[str, Maker] = {
    "a claimed one starts": lambda api, it: Situation(
        api.an_acquired_step(None, it), "start", {"container": "c", "imageDigest": "sha256:1"}
    ),
    "one that runs starts again": lambda api, it: Situation(started(api, it), "start", {}),
    "a cancelled one starts": lambda api, it: Situation(
        cancelled(api, api.an_acquired_step(None, it)), "start", {}
    ),
    "a later attempt starts": lambda api, it: Situation(taken_again(api, it)[1], "start", {}),
    "a former attempt starts": lambda api, it: Situation(taken_again(api, it)[0], "start", {}),
    "an unknown one starts": lambda api, it: Situation(unknown(api, it), "start", {}),
    "somebody else's starts": lambda api, it: Situation(foreign(api, it), "start", {}),
    "it has succeeded": lambda api, it: Situation(started(api, it), "complete", SUCCESS),
    "the first of two has succeeded": lambda api, it: Situation(started(api, it, CHAIN), "complete", SUCCESS),
    "it has succeeded with a log": lambda api, it: Situation(
        with_log(started(api, it)),
        "complete",
        {"status": "success", "logSize": len(LOG), "logSha256": DIGEST},
    ),
    "more of its log is told than came": lambda api, it: Situation(
        with_log(started(api, it)), "complete", {"status": "success", "logSize": 1000}
    ),
    "its log is another one": lambda api, it: Situation(
        with_log(started(api, it)),
        "complete",
        {"status": "success", "logSize": len(LOG), "logSha256": "0" * 64},
    ),
    "nothing is told of its log": lambda api, it: Situation(
        with_log(started(api, it)), "complete", {"status": "success"}
    ),
    "its log has a gap": lambda api, it: Situation(
        with_log(started(api, it)), "complete", {"status": "success", "logGap": True}
    ),
    "it hands on what it should": lambda api, it: Situation(
        with_blob(started(api, it, HANDS_ON)), "complete", {**SUCCESS, "artifacts": [FILE]}
    ),
    "it hands on what has not arrived": lambda api, it: Situation(
        started(api, it, HANDS_ON),
        "complete",
        {**SUCCESS, "artifacts": [{**FILE, "sha256": "1" * 64}]},
    ),
    "it does not hand on what it should": lambda api, it: Situation(
        started(api, it, HANDS_ON), "complete", SUCCESS
    ),
    "it hands on what lies elsewhere": lambda api, it: Situation(
        started(api, it), "complete", {**SUCCESS, "artifacts": [{**FILE, "path": "../out.txt"}]}
    ),
    "it has succeeded with exit code 3": lambda api, it: Situation(
        started(api, it), "complete", {**SUCCESS, "exitCode": 3}
    ),
    "it has failed": lambda api, it: Situation(
        started(api, it, CHAIN), "complete", {"status": "failed", "exitCode": 3, "logSize": 0}
    ),
    "it has failed and is tried again": lambda api, it: Situation(
        started(api, it, TRIES_TWICE), "complete", {"status": "failed", "exitCode": 7, "logSize": 0}
    ),
    "it was lost to the machine": lambda api, it: Situation(
        started(api, it), "complete", {"status": "failed", "reason": "daemon_error", "logSize": 0}
    ),
    "a cancelled one has succeeded": lambda api, it: Situation(
        cancelled(api, started(api, it)), "complete", SUCCESS
    ),
    "one that never started has succeeded": lambda api, it: Situation(
        api.an_acquired_step(None, it), "complete", SUCCESS
    ),
    "it has ended already": lambda api, it: Situation(ended(started(api, it)), "complete", SUCCESS),
    "it has ended otherwise": lambda api, it: Situation(
        ended(started(api, it)), "complete", {"status": "failed", "logSize": 0}
    ),
    "an unknown one has succeeded": lambda api, it: Situation(unknown(api, it), "complete", SUCCESS),
    "somebody else's has succeeded": lambda api, it: Situation(foreign(api, it), "complete", SUCCESS),
}


def ended(held: HeldOverHttp) -> HeldOverHttp:
    assert held.post("complete", SUCCESS).status_code == 200
    return held


def made(api: Api, runner: dict[str, str]) -> list[Situation]:
    return [maker(api, runner) for maker in SITUATIONS.values()]


def tell_alone(situations: Sequence[Situation]) -> list[tuple[int, Any]]:
    answers = [one.held.post(one.verb, one.said) for one in situations]
    return [(answer.status_code, answer.json()) for answer in answers]


def reports_of(situations: Sequence[Situation]) -> dict[str, Any]:
    return {
        "starts": [{**one.proof, **one.said} for one in situations if one.verb == "start"],
        "completions": [{**one.proof, **one.said} for one in situations if one.verb == "complete"],
    }


def tell_together(api: Api, runner: dict[str, str], situations: Sequence[Situation]) -> list[tuple[int, Any]]:
    answer = api.client.post("/api/runner/reports", json=reports_of(situations), headers=runner)
    assert answer.status_code == 200, answer.text
    said = answer.json()
    answers = {"start": iter(said["starts"]), "complete": iter(said["completions"])}
    found = [next(answers[one.verb]) for one in situations]
    assert not [*answers["start"], *answers["complete"]]
    return [(one["status"], one.get("answer") or one["refused"]) for one in found]


def seen_in(mill: Mill, situations: Sequence[Situation]) -> list[Any]:
    """The step, its attempts and its build of each, without ids and times."""
    found: list[Any] = []
    for one in situations:
        build_id = one.held.claim["buildId"]
        if not build_id:
            continue
        step = mill.step(one.held.step_id)
        rows = [
            tuple(step),
            *(tuple(row) for row in mill.attempts(step.id)),
            mill.build(build_id).model_dump(),
        ]
        found.append(_TIME.sub("", _ID.sub("", repr([_plain(row) for row in rows]))))
    return found


def _plain(row: Any) -> Any:
    """Moments as whether there is one: the clock stands still, and lengths of time are told by others."""
    values = row.items() if isinstance(row, dict) else enumerate(row)
    return [
        (name, "a moment" if hasattr(value, "isoformat") else str(value))
        for name, value in values
        if name != "number" and not _is_proof(value)
    ]


def _is_proof(value: object) -> bool:
    """Request ids differ in each claim."""
    return isinstance(value, str) and len(value) == 36 and _ID.fullmatch(value) is not None


def trail(mill: Mill) -> Counter[str]:
    return Counter(
        _ID.sub("", f"{row.action} {row.actor} {sorted(row.details.items())}")
        for row in mill.audited()
        if row.action.startswith(("step.", "build."))
    )


def test_each_report_counts_as_if_it_had_come_alone(api: Api, mill: Mill) -> None:
    runner = api.a_runner()
    alone = made(api, runner)
    before = trail(mill)
    answers_alone = tell_alone(alone)
    trail_alone = trail(mill) - before
    seen_alone = seen_in(mill, alone)
    assert api.acquire(api.a_runner(), slots=64)  # what is ready now is none of the others' steps
    several = made(api, runner)
    before = trail(mill)

    answers = tell_together(api, runner, several)

    names = list(SITUATIONS)
    assert dict(zip(names, answers, strict=True)) == dict(zip(names, answers_alone, strict=True))
    assert seen_in(mill, several) == seen_alone
    assert trail(mill) - before == trail_alone
    assert {status for status, _ in answers} == {200, 400, 404, 409}


def test_told_again_all_is_answered_as_it_was(api: Api) -> None:
    runner = api.a_runner()
    situations = made(api, runner)
    first = tell_together(api, runner, situations)

    again = tell_together(api, runner, situations)

    same = [name for name, one, other in zip(SITUATIONS, first, again, strict=True) if one == other]
    # a step that was made ready again is no longer this attempt's, and a log that was lost is asked for anew
    assert set(SITUATIONS) - set(same) <= {"it has failed and is tried again", "it was lost to the machine"}


def test_all_steps_of_a_build_at_once_end_it_once(api: Api, mill: Mill) -> None:
    runner = api.a_runner()
    build = api.a_build(
        [*a_spec(**{f"s{n}": [] for n in range(9)}), a_step("last", [f"s{n}" for n in range(9)])]
    )
    held = [HeldOverHttp(api.client, claim, runner) for claim in api.acquire(runner, slots=10)]
    assert len(held) == 9
    tell_together(api, runner, [Situation(one, "start", {}) for one in held])

    tell_together(api, runner, [Situation(one, "complete", SUCCESS) for one in held])

    (last,) = [HeldOverHttp(api.client, claim, runner) for claim in api.acquire(runner, slots=10)]
    answers = tell_together(api, runner, [Situation(last, "start", {}), Situation(last, "complete", SUCCESS)])
    assert answers[1] == (200, {"success": True, "stepStatus": "SUCCESS", "buildComplete": True})
    assert api.build(build["id"])["status"] == "SUCCESS"
    assert len(mill.audited("build.finished")) == 1
    assert len(mill.audited("step.finished")) == 10


@pytest.mark.threat("I03")
def test_the_same_reports_many_times_at_once_are_one_end_each(api: Api, mill: Mill) -> None:
    runner = api.a_runner()
    api.a_build(a_spec(**{f"s{n}": [] for n in range(6)}))
    held = [HeldOverHttp(api.client, claim, runner) for claim in api.acquire(runner, slots=6)]
    tell_together(api, runner, [Situation(one, "start", {}) for one in held])
    ends = reports_of([Situation(one, "complete", SUCCESS) for one in held])

    answers = together(
        *[lambda: api.client.post("/api/runner/reports", json=ends, headers=runner)] * 20,
        *[lambda one=one: one.post("complete", SUCCESS) for one in held],
    )

    assert {answer.status_code for answer in answers} == {200}  # type: ignore[union-attr]
    for answer in answers[:20]:
        assert {one["status"] for one in answer.json()["completions"]} == {200}  # type: ignore[union-attr]
    assert len(mill.audited("step.finished")) == 6
    assert len(mill.audited("build.finished")) == 1


@pytest.mark.threat("A06")
def test_who_speaks_of_what_others_hold_is_written_down(api: Api, mill: Mill) -> None:
    runner = api.a_runner()

    (answer,) = tell_together(api, runner, [Situation(foreign(api, runner), "complete", SUCCESS)])

    assert answer[0] == 409
    (row,) = mill.audited("access.denied")
    assert (row.details["path"], row.details["status"]) == ("/api/runner/reports", 409)


@ON_SQLITE
@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"starts": [{"stepId": "a", "attempt": 1, "lease": "x"}] * 65}, "starts"),
        ({"completions": [{"stepId": "a", "attempt": 1, "lease": "x"}]}, "completions[0].status"),
        ({"starts": [{"stepId": "a", "lease": "x"}]}, "starts[0].attempt"),
        ({"starts": [{"stepId": "a", "attempt": 0, "lease": "x"}]}, "starts[0].attempt"),
        ({"starts": [{"stepId": "a", "attempt": 1, "lease": "x" * 129}]}, "starts[0].lease"),
        ({"starts": [{"stepId": "a", "attempt": number, "lease": "x"} for number in (1, 2)]}, "starts"),
        ({"reports": []}, "reports"),
        ([], "body"),
    ],
)
def test_what_cannot_be_read_is_refused_as_a_whole(api: Api, body: Any, where: str) -> None:
    answer = api.client.post("/api/runner/reports", json=body, headers=api.a_runner())

    assert answer.status_code == 400
    assert where in {fault["path"] for fault in answer.json()["details"]}


@ON_SQLITE
def test_nothing_to_tell_is_answered_with_nothing(api: Api) -> None:
    answer = api.client.post("/api/runner/reports", json={}, headers=api.a_runner())

    assert (answer.status_code, answer.json()) == (200, {"starts": [], "completions": []})


def told(held: Held, said: Start | Completion) -> Told:
    return Told(held.step_id, held.proof, said)


def test_what_is_plain_goes_together_and_the_rest_is_left_as_it_was(mill: Mill) -> None:
    runner = mill.a_runner()
    done = Completion(status="success", log_size=0)
    claimed, running = mill.an_acquired_step(runner=runner), mill.a_running_step(runner=runner)
    failing = mill.a_running_step(runner=runner)
    stale = told(claimed, Start())
    reports = {
        0: told(claimed, Start()),
        1: told(failing, Completion(status="failed", log_size=0)),
        2: told(running, done),
        3: replace(stale, proof=LeaseProof(1, "another")),
        4: told(running, done),
    }

    answers = mill.now(take_reports, mill.site, runner.caller, reports)

    assert answers == {
        0: StartAnswer(action="go", timeout_s=3600, grace_s=10),
        2: Verdict(is_same=True, state=mill.step(running.step_id).state, is_build_complete=True),
    }
    states = [str(mill.step(held.step_id).state) for held in (claimed, running, failing)]
    assert states == ["running", "succeeded", "running"]


def test_a_later_attempt_is_not_plain_as_it_may_have_a_log_to_end(mill: Mill) -> None:
    runner = mill.a_runner()
    first = mill.an_acquired_step(runner=runner)
    mill.now(release_step, mill.site, runner.caller, first.step_id, first.proof, reason="no room")
    (second,) = mill.acquire(runner)

    answers = mill.now(take_reports, mill.site, runner.caller, {0: told(second, Start())})

    assert answers == {}
    assert mill.step(second.step_id).attempt == 2


@ON_SQLITE
def test_what_is_named_is_found_without_a_walk_along_the_queue(
    mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: dict[str, str] = {}
    execute = _Compiled.execute

    def explain(compiled: _Compiled, tx: Any, values: Any) -> Any:
        cursor = tx.connection().connection.dbapi_connection.cursor()
        cursor.execute(f"EXPLAIN QUERY PLAN {compiled._sql}", compiled._parameters(values))
        plans[compiled._sql] = str([row[3] for row in cursor.fetchall()])
        return execute(compiled, tx, values)

    monkeypatch.setattr(_Compiled, "execute", explain)
    runner = mill.a_runner()
    held = mill.an_acquired_step(a_spec(first=[], second=["first"]), runner)
    for said in (Start(), Completion(status="success", log_size=0)):
        assert mill.now(take_reports, mill.site, runner.caller, {0: told(held, said)})

    walks = [sql for sql, plan in plans.items() if "ix_steps_queue " in plan]
    assert len(plans) > 10
    assert len(walks) == 1  # the claim itself
    assert "MATERIALIZED" in walks[0]
    repeated = [plan for sql, plan in plans.items() if "steps.request_id = " in sql]
    assert "ix_steps_runner (runner_id=? AND state=?)" in repeated[0]
    assert not [plan for plan in plans.values() if re.search(r"SCAN (steps|builds|step_attempts)\b", plan)]


def test_what_breaks_one_report_breaks_no_other(api: Api, mill: Mill) -> None:
    runner = api.a_runner()
    good = [Situation(started(api, runner), "complete", SUCCESS) for _ in range(3)]
    broken = with_log(started(api, runner))
    step = mill.step(broken.step_id)
    path = mill.site.logs.path(step.build_id, step.id, step.attempt)
    path.unlink()
    path.mkdir()
    bad = Situation(broken, "complete", {"status": "success", "logSize": len(LOG)})

    answers = tell_together(api, runner, [*good, bad])

    assert [status for status, _ in answers] == [200, 200, 200, 500]
    assert answers[3][1]["code"] == "internal"


def test_an_error_that_nobody_foresaw_leaves_each_to_itself(api: Api, mill: Mill) -> None:
    runner = api.a_runner()
    held = [started(api, runner) for _ in range(3)]
    mill.tx(
        lambda tx: tx.connection().execute(
            update(STEPS).where(STEPS.c.id == held[0].step_id).values(spec={"timeoutSeconds": 1})
        )
    )

    answers = tell_together(api, runner, [Situation(one, "complete", SUCCESS) for one in held])

    assert [status for status, _ in answers] == [500, 200, 200]


def test_a_log_is_read_once_for_its_completion(api: Api, mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = api.a_runner()
    told_of = {
        "plain": {"status": "success", "logSize": len(LOG)},
        "not what it seemed": {"status": "success", "logSize": len(LOG), "exitCode": 0, "artifacts": [FILE]},
        "failed": {"status": "failed", "logSize": len(LOG)},
    }
    held = [Situation(with_log(started(api, runner)), "complete", said) for said in told_of.values()]
    seals: list[Any] = []
    seal = LogFiles.seal
    monkeypatch.setattr(LogFiles, "seal", lambda *known: (seals.append(known), seal(*known))[1])

    answers = tell_together(api, runner, held)

    assert [status for status, _ in answers] == [200, 409, 200]
    assert len(seals) == 3


def test_an_id_in_capitals_is_the_same_step(api: Api) -> None:
    runner = api.a_runner()
    held = api.an_acquired_step(None, runner)
    said = reports_of([Situation(held, "start", {})])
    said["starts"][0]["stepId"] = held.step_id.upper()

    answer = api.client.post("/api/runner/reports", json=said, headers=runner)

    assert [one["status"] for one in answer.json()["starts"]] == [200]


def test_a_refusal_says_when_to_come_again(api: Api, mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = api.a_runner()
    (held,) = [api.an_acquired_step(None, runner)]

    def unavailable(*_: Any, **__: Any) -> None:
        raise Unavailable("the database is away")

    monkeypatch.setattr(start_module, "hold_leased_step", unavailable)
    monkeypatch.setattr(reports_module.steps, "list_steps_by_id", unavailable)

    answer = api.client.post(
        "/api/runner/reports", json=reports_of([Situation(held, "start", {})]), headers=runner
    )

    (report,) = answer.json()["starts"]
    assert (report["status"], report["refused"]["retryAfter"]) == (503, 1)


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Why transactions had to be run again."""
    found: list[str] = []
    may_be_retried = lanes_module.may_be_retried

    def listen(error: Any) -> bool:
        if may_be_retried(error):
            found.append(str(error.orig))
        return may_be_retried(error)

    monkeypatch.setattr(lanes_module, "may_be_retried", listen)
    return found


@ON_POSTGRES
def test_several_steps_are_held_in_the_order_of_their_ids(mill: Mill, repeated: list[str]) -> None:
    runner = mill.a_runner()
    running, claimed = mill.a_running_step(runner=runner), mill.an_acquired_step(runner=runner)
    assert running.step_id < claimed.step_id
    has_first = threading.Event()

    def touch_both(tx: Session) -> None:
        """As a heartbeat does, and slowly."""
        touch_steps(tx, [running.step_id], runner.id, now=mill.clock())
        has_first.set()
        time.sleep(0.5)
        touch_steps(tx, [claimed.step_id], runner.id, now=mill.clock())

    def tell_both() -> int:
        assert has_first.wait(10)
        # starts are recorded before completions
        reports = {0: told(claimed, Start()), 1: told(running, Completion(status="success", log_size=0))}
        return len(mill.now(take_reports, mill.site, runner.caller, reports))

    outcomes = together(lambda: mill.tx(touch_both), tell_both)

    assert outcomes == [None, 2]
    assert repeated == []


@ON_POSTGRES
def test_heartbeats_starts_and_ends_of_the_same_steps_never_wait_for_each_other_in_a_circle(
    mill: Mill, repeated: list[str]
) -> None:
    runner = mill.a_runner()
    mill.a_build(a_spec(**{f"s{n}": [] for n in range(40)}))
    held = mill.acquire(runner, slots=40)
    is_over = threading.Event()

    def beat() -> None:
        for phase in itertools.cycle((Phase.RUNNING, Phase.UPLOADING)):
            if is_over.is_set():
                return
            said = [one.report(phase) for one in held]
            mill.now(renew_leases, mill.site, runner.caller, Heartbeat(session=runner.session, attempts=said))

    def tell(said: Start | Completion, some: Sequence[Held]) -> None:
        first, second = {0: told(some[0], said), 1: told(some[1], said)}, some[2:]
        group = mill.now(take_reports, mill.site, runner.caller, first)
        assert len(group) == 2
        for one in second:
            if isinstance(said, Start):
                mill.start(one)
            else:
                mill.complete(one)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        for at in range(0, 40, 8):
            parts = [held[at + 3 : at - 1 if at else None : -1], held[at + 4 : at + 8]]
            for said in (Start(), Completion(status="success", log_size=0)):
                together(*[lambda part=part, said=said: tell(said, part) for part in parts])
    finally:
        is_over.set()
        beating.join(30)

    assert repeated == []
    assert {str(mill.step(one.step_id).state) for one in held} == {"succeeded"}
