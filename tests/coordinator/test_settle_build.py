"""What follows when steps have ended."""

import pytest

from tests.factories import Mill, a_spec, together

DIAMOND = a_spec(top=[], left=["top"], right=["top"], bottom=["left", "right"])


def test_a_diamond_runs_from_top_to_bottom(mill: Mill) -> None:
    build = mill.a_build(DIAMOND)
    runner = mill.a_runner()

    order = []
    while held := mill.acquire(runner, slots=4):
        order.append({one.claim.name for one in held})
        for one in held:
            mill.complete(one)

    assert order == [{"top"}, {"left", "right"}, {"bottom"}]
    assert mill.build(build.id).state == "succeeded"
    assert mill.build(build.id).reason is None


def test_a_build_tells_why_its_first_failed_step_failed_whatever_ends_last(mill: Mill) -> None:
    build = mill.a_build(a_spec(bad=[], worse=[], good=[]))
    held = {one.claim.name: one for one in mill.acquire(mill.a_runner(), slots=3)}

    mill.complete(held["bad"], "failed", reason="timeout")
    mill.complete(held["worse"], "failed", reason="oom")
    mill.complete(held["good"])

    assert mill.build(build.id).state == "failed"
    assert mill.build(build.id).reason == "timeout"


def test_a_step_waits_for_the_last_of_those_it_depends_on(mill: Mill) -> None:
    build = mill.a_build(a_spec(one=[], two=[], both=["one", "two"]))
    first, second = mill.acquire(mill.a_runner(), slots=2)

    mill.complete(first)
    assert mill.states(build)["both"] == "pending"

    mill.complete(second)
    assert mill.states(build)["both"] == "ready"


def test_a_failed_step_skips_everything_behind_it_and_nothing_else(mill: Mill) -> None:
    build = mill.a_build(a_spec(bad=[], next=["bad"], last=["next"], other=[], beside=["other"]))
    held = {one.claim.name: one for one in mill.acquire(mill.a_runner(), slots=2)}

    mill.complete(held["bad"], "failed", exit_code=3)

    assert mill.states(build) == {
        "bad": "failed",
        "next": "skipped",
        "last": "skipped",
        "other": "claimed",
        "beside": "pending",
    }
    assert mill.build(build.id).state == "running"


def test_a_build_fails_when_the_rest_has_run_and_tells_the_reason(mill: Mill) -> None:
    build = mill.a_build(a_spec(bad=[], behind=["bad"], good=[]))
    held = {one.claim.name: one for one in mill.acquire(mill.a_runner(), slots=2)}

    mill.complete(held["good"])
    verdict = mill.complete(held["bad"], "failed", exit_code=3)

    assert verdict.is_build_complete
    assert mill.build(build.id).state == "failed"
    assert mill.build(build.id).reason == "exit_nonzero"
    assert mill.build(build.id).finished_at == mill.clock()


def test_only_the_completion_that_ends_the_build_says_so(mill: Mill) -> None:
    mill.a_build(a_spec(one=[], two=[]))
    first, second = mill.acquire(mill.a_runner(), slots=2)

    assert not mill.complete(first).is_build_complete
    assert mill.complete(second).is_build_complete


@pytest.mark.threat("I05")
def test_steps_that_end_at_the_same_moment_end_their_build(mill: Mill) -> None:
    runner = mill.a_runner()
    width = 4
    for _ in range(6):
        build = mill.a_build(a_spec(**{f"step-{number}": [] for number in range(width)}))
        held = mill.acquire(runner, slots=width)

        verdicts = together(*[lambda one=one: mill.complete(one) for one in held])

        assert sum(verdict.is_build_complete for verdict in verdicts) == 1  # type: ignore[union-attr]
        assert mill.build(build.id).state == "succeeded"


def test_the_last_two_before_a_join_that_end_at_the_same_moment_release_it(mill: Mill) -> None:
    runner = mill.a_runner()
    for _ in range(6):
        build = mill.a_build(a_spec(left=[], right=[], join=["left", "right"]))
        held = mill.acquire(runner, slots=2)

        together(*[lambda one=one: mill.complete(one) for one in held])

        assert mill.states(build)["join"] == "ready"
        mill.complete(mill.acquire(runner)[0])
        assert mill.build(build.id).state == "succeeded"


def test_a_thousand_steps_behind_a_failed_one_are_skipped_at_once(mill: Mill) -> None:
    graph: dict[str, list[str]] = {"step-0": []}
    graph |= {f"step-{number}": [f"step-{number - 1}"] for number in range(1, 300)}
    graph |= {f"wide-{number}": ["step-0"] for number in range(700)}
    build = mill.a_build(a_spec(**graph))

    mill.complete(mill.acquire(mill.a_runner())[0], "failed")

    states = list(mill.states(build).values())
    assert states.count("skipped") == 999
    assert mill.build(build.id).state == "failed"
