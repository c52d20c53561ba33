"""The drill's checker: a history with something wrong in it is never taken for a good one."""

import hashlib
import json
from dataclasses import replace

import pytest

from coordinator.cli.drill.checker import Wanted, check_build
from coordinator.cli.drill.history import History, SeenArtifact, SeenAttempt, SeenStep
from coordinator.cli.drill.report import record_of, rows_of, verdict_line
from coordinator.cli.drill.result import FaultResult, Figure, Finding, Kind, Outcome, Seen, is_clean, judge
from coordinator.cli.drill.workload import layered_build, numbered_line

DRILL = "drill-test"
LINES = 5
ONCE = (("step.claimed", 1), ("step.started", 1), ("step.finished", 1))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def numbered(name: str, numbers, *, attempt: int = 1, run: str = "r") -> bytes:
    return b"".join(numbered_line(DRILL, name, attempt, run, number) + b"\n" for number in numbers)


def an_attempt(name: str, numbers=range(1, LINES + 1), **more) -> SeenAttempt:
    number = more.get("number", 1)
    log = more.pop("log", b"") or b"##[buildmill:start x]\n" + numbered(name, numbers, attempt=number)
    made = {
        "number": number,
        "outcome": "succeeded",
        "reason": "",
        "log": log,
        "log_size": len(log),
        "log_sha256": digest(log),
        "log_state": "complete",
    }
    return SeenAttempt(**{**made, **more})


def a_step(name: str, *attempts: SeenAttempt, output: bytes | None = None, **more) -> SeenStep:
    output = numbered(name, range(1, LINES + 1), attempt=len(attempts) or 1) if output is None else output
    made = {
        "name": name,
        "status": "SUCCESS",
        "reason": "",
        "depends_on": (),
        "started_at": "2026-01-01T00:00:01.000Z",
        "finished_at": "2026-01-01T00:00:02.000Z",
        "attempts": attempts or (an_attempt(name),),
        "artifacts": (SeenArtifact(f"out/{name}.txt", digest(output), output),),
        "events": ONCE,
    }
    return SeenStep(**{**made, **more})


def a_history(*steps: SeenStep, status: str = "SUCCESS") -> History:
    return History("the-build", status, steps)


def kinds_in(history: History, **wanted: Wanted) -> list[Kind]:
    wanted = wanted or {step.name: Wanted(LINES) for step in history.steps}
    return [finding.kind for finding in check_build(history, wanted, DRILL)]


def test_a_build_in_which_everything_happened_once_is_found_good() -> None:
    first = a_step("a")
    found = f"drill-input:{DRILL}:b:a:{first.artifacts[0].sha256}\n".encode()
    log = found + numbered("b", range(1, LINES + 1))
    second = a_step(
        "b",
        an_attempt("b", log=log),
        depends_on=("a",),
        started_at="2026-01-01T00:00:03.000Z",
        finished_at="2026-01-01T00:00:04.000Z",
    )

    assert check_build(a_history(first, second), {"a": Wanted(LINES), "b": Wanted(LINES)}, DRILL) == []


def test_a_line_that_is_there_twice_is_a_duplicate() -> None:
    log = numbered("a", [1, 2, 2, 3, 4, 5])

    assert Kind.DUPLICATE in kinds_in(a_history(a_step("a", an_attempt("a", log=log))))


def test_a_line_that_is_missing_is_a_loss() -> None:
    log = numbered("a", [1, 2, 4, 5])

    assert Kind.LOSS in kinds_in(a_history(a_step("a", an_attempt("a", log=log))))


def test_the_last_line_missing_is_a_loss() -> None:
    log = numbered("a", [1, 2, 3, 4])
    step = a_step("a", an_attempt("a", log=log), output=log)

    assert kinds_in(a_history(step)) == [Kind.LOSS]


def test_a_line_cut_in_two_is_a_loss() -> None:
    log = numbered("a", range(1, 6)).replace(b":r:3", b":r\n:3")

    found = check_build(a_history(a_step("a", an_attempt("a", log=log))), {"a": Wanted(LINES)}, DRILL)
    assert any("is mangled" in finding.what for finding in found if finding.kind is Kind.LOSS)


@pytest.mark.parametrize(("state", "expected"), [("gap", []), ("complete", [Kind.LOSS])])
def test_a_line_may_be_cut_where_the_log_says_that_bytes_are_missing(
    state: str, expected: list[Kind]
) -> None:
    cut = numbered("a", [1, 2])[:-5] + b"\n[buildmill] error: bytes are missing here, behind byte 60\n"
    full = an_attempt("a", log=cut, outcome="failed", reason="disk_full", log_state=state)
    step = a_step("a", full, an_attempt("a", number=2))

    assert kinds_in(a_history(step), a=Wanted(LINES, attempts=2)) == expected


def test_lines_in_another_order_are_told() -> None:
    log = numbered("a", [1, 3, 2, 4, 5])

    assert Kind.ORDER in kinds_in(a_history(a_step("a", an_attempt("a", log=log))))


def test_a_script_that_ran_twice_in_one_attempt_is_a_duplicate_even_when_each_run_is_whole() -> None:
    log = numbered("a", [1, 2], run="first") + numbered("a", [3, 4, 5], run="second")
    step = a_step("a", an_attempt("a", log=log), output=log)

    assert kinds_in(a_history(step)) == [Kind.DUPLICATE]


def test_an_attempt_too_many_is_a_duplicate() -> None:
    lost = an_attempt("a", [1, 2], outcome="lost", reason="runner_lost", log_sha256="")
    step = a_step("a", lost, an_attempt("a", number=2))

    assert kinds_in(a_history(step)) == [Kind.DUPLICATE]
    assert kinds_in(a_history(step), a=Wanted(LINES, attempts=2)) == []


def test_a_gap_in_the_log_of_a_lost_attempt_is_a_loss_and_its_missing_end_is_none() -> None:
    lost = an_attempt("a", [1, 3], outcome="lost", reason="runner_lost", log_sha256="")
    step = a_step("a", lost, an_attempt("a", number=2))

    assert kinds_in(a_history(step), a=Wanted(LINES, attempts=2)) == [Kind.LOSS]


@pytest.mark.parametrize("event", ["step.claimed", "step.started", "step.finished"])
def test_what_is_in_the_trail_twice_is_a_duplicate(event: str) -> None:
    step = a_step("a", events=(*ONCE, (event, 1)))

    assert Kind.DUPLICATE in kinds_in(a_history(step))


def test_two_ends_of_two_attempts_are_a_duplicate() -> None:
    step = a_step("a", events=(*ONCE, ("step.finished", 2)))

    assert kinds_in(a_history(step)) == [Kind.DUPLICATE]


def test_a_log_that_differs_from_its_digest_is_a_loss() -> None:
    step = a_step("a", replace(an_attempt("a"), log_sha256=digest(b"else")))

    assert kinds_in(a_history(step)) == [Kind.LOSS]


def test_a_log_that_is_shorter_than_recorded_is_a_loss() -> None:
    step = a_step("a", replace(an_attempt("a"), log_size=1000))

    assert kinds_in(a_history(step)) == [Kind.LOSS]


def test_the_log_of_a_success_that_was_never_sealed_is_a_loss() -> None:
    step = a_step("a", replace(an_attempt("a"), log_sha256=""))

    assert kinds_in(a_history(step)) == [Kind.LOSS]


def test_a_missing_output_is_a_loss() -> None:
    assert kinds_in(a_history(replace(a_step("a"), artifacts=()))) == [Kind.LOSS]


def test_an_output_that_differs_from_its_digest_is_a_loss() -> None:
    step = a_step("a")
    bad = replace(step.artifacts[0], sha256=digest(b"else"))

    assert kinds_in(a_history(replace(step, artifacts=(bad,)))) == [Kind.LOSS]


def test_an_output_with_lines_of_a_second_run_is_a_duplicate() -> None:
    lines = numbered("a", range(1, 6))

    assert kinds_in(a_history(a_step("a", output=lines + lines))) == [Kind.DUPLICATE]


def test_a_step_that_started_before_its_dependency_had_finished_is_out_of_order() -> None:
    first = replace(a_step("a"), artifacts=())
    second = a_step("b", depends_on=("a",), started_at="2026-01-01T00:00:01.500Z")

    found = kinds_in(a_history(first, second), a=Wanted(LINES, keeps=False), b=Wanted(LINES))
    assert found == [Kind.ORDER]


def test_a_step_that_did_not_find_what_its_dependency_left_is_a_loss() -> None:
    second = a_step("b", depends_on=("a",), started_at="2026-01-01T00:00:03.000Z")

    assert kinds_in(a_history(a_step("a"), second)) == [Kind.LOSS]


def test_a_step_that_is_not_there_is_a_loss() -> None:
    assert kinds_in(a_history(a_step("a")), a=Wanted(LINES), b=Wanted(LINES)) == [Kind.LOSS]


def test_a_step_that_ended_otherwise_is_told() -> None:
    step = a_step("a", status="FAILED", reason="internal")

    assert kinds_in(a_history(step, status="FAILED")) == [Kind.WRONG, Kind.WRONG]


def test_an_attempt_that_should_have_been_and_was_not_is_told() -> None:
    assert kinds_in(a_history(a_step("a")), a=Wanted(LINES, attempts=2)) == [Kind.WRONG]


def test_lines_that_nobody_printed_are_told() -> None:
    log = numbered("a", range(1, 8))

    assert kinds_in(a_history(a_step("a", an_attempt("a", log=log), output=log))) == [Kind.WRONG]


def test_the_log_of_a_success_that_was_cut_is_a_loss() -> None:
    step = a_step("a", replace(an_attempt("a"), log_state="truncated"))

    assert kinds_in(a_history(step)) == [Kind.LOSS]


def test_an_output_that_is_listed_twice_is_a_duplicate() -> None:
    step = a_step("a")

    assert kinds_in(a_history(replace(step, artifacts=step.artifacts * 2))) == [Kind.DUPLICATE]


def test_a_line_of_another_step_in_a_log_is_told() -> None:
    log = numbered("a", range(1, 6)) + numbered("b", [1])
    output = numbered("a", range(1, 6)) + numbered("b", [1])

    assert kinds_in(a_history(a_step("a", an_attempt("a", log=log), output=output))) == [Kind.WRONG]


def test_a_line_of_another_attempt_in_a_log_is_told() -> None:
    log = numbered("a", range(1, 6)) + numbered("a", [1], attempt=2)

    assert kinds_in(a_history(a_step("a", an_attempt("a", log=log), output=log))) == [Kind.WRONG]


def test_a_step_that_started_behind_one_that_never_finished_is_out_of_order() -> None:
    first = replace(a_step("a"), artifacts=(), finished_at="")
    second = a_step("b", depends_on=("a",))

    found = kinds_in(a_history(first, second), a=Wanted(LINES, keeps=False), b=Wanted(LINES))
    assert found == [Kind.ORDER]


# --- verdicts


def a_result(*findings: Finding, figures: tuple[Figure, ...] = ()) -> FaultResult:
    return judge("a-fault", Seen(figures, findings), took_s=1.0)


def test_a_recovery_that_came_late_breaks_the_promise_and_is_said() -> None:
    result = a_result(figures=(Figure("steps adopted", 10.2, 10.0),))

    assert result.outcome is Outcome.BROKEN
    assert not is_clean([result])
    assert any("late: steps adopted: 10.2 s, where 10 s are promised" in row for row in rows_of(result))
    assert "1 late recovery" in verdict_line([result], took_s=1.0)


def test_a_recovery_in_time_keeps_it() -> None:
    result = a_result(figures=(Figure("steps adopted", 9.9, 10.0),))

    assert (result.outcome, is_clean([result])) == (Outcome.HELD, True)


def test_one_broken_promise_among_many_kept_ones_is_a_broken_drill() -> None:
    results = [a_result(), a_result(Finding(Kind.DUPLICATE, "twice"), Finding(Kind.LOSS, "gone")), a_result()]

    assert not is_clean(results)
    said = verdict_line(results, took_s=3.0)
    assert said.startswith("verdict: NOT what is promised: 1 duplicate, 1 loss,")


def test_a_drill_in_which_everything_was_skipped_has_shown_nothing() -> None:
    skipped = FaultResult("a-fault", Outcome.SKIPPED, Seen(note="not here"), 0.0)

    assert not is_clean([skipped])
    assert is_clean([skipped, a_result()])


def test_the_record_can_be_written_as_json_with_logs_and_outputs() -> None:
    result = judge("a-fault", Seen(builds=(a_history(a_step("a")),)), took_s=1.0)

    record = json.loads(json.dumps(record_of([result], {"drill": DRILL}, took_s=2.0)))

    assert record["held"] is True
    assert DRILL in record["faults"][0]["seen"]["builds"][0]["steps"][0]["attempts"][0]["log"]


def test_the_synthetic_build_has_layers_and_goes_to_runners_of_the_drill_only() -> None:
    steps = layered_build(DRILL, 7, lines=LINES)

    assert [step["dependsOn"] for step in steps] == [[]] * 3 + [["s1", "s2", "s3"]] * 3 + [["s4", "s5", "s6"]]
    assert {tuple(step["labels"]) for step in steps} == {(DRILL,)}
