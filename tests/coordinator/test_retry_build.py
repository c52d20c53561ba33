"""A build that runs again: what is run, what is kept, and what counts afterwards."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update

from coordinator.actions import retry_build as retry_build_module
from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.change_workflow import change_workflow
from coordinator.actions.complete_step import complete_bare_step
from coordinator.actions.delete_project import delete_project
from coordinator.actions.list_artifacts import list_artifacts
from coordinator.actions.retry_build import StepsToRetry, retry_build
from coordinator.actions.show_artifact import show_artifact
from coordinator.actions.show_build import BuildView, show_all_rounds
from coordinator.actions.show_step_log import show_step_log
from coordinator.actions.stop_overdue_builds import stop_overdue_builds
from coordinator.errors import Conflict, CoordinatorError, NotFound, StaleAttempt
from coordinator.store import builds, steps, stops
from coordinator.tables import Build, Step, StepAttempt, StepLabel, table_of
from shared.protocol import Action, Completion
from tests.factories import LOCAL, Api, Held, MadeBuild, Mill, a_spec, a_step, together

DIAMOND = a_spec(top=[], left=["top"], right=["top"], bottom=["left", "right"])


def retry(mill: Mill, build: MadeBuild, which: str = "failed") -> BuildView:
    return mill.now(retry_build, LOCAL, build.id, StepsToRetry(which))


def cancel(mill: Mill, build: MadeBuild) -> str:
    return mill.now(cancel_build, mill.site, LOCAL, build.id).cancel_id or ""


def rows(mill: Mill, build: MadeBuild) -> dict[str, Any]:
    """The steps as they stand: the latest row of each name."""
    return {row.name: row for row in mill.tx(steps.list_steps, build.id)}


def rounds_of(mill: Mill, build: MadeBuild) -> dict[str, int]:
    return {name: row.round for name, row in rows(mill, build).items()}


def everything(mill: Mill, build: MadeBuild) -> dict[str, tuple[Any, ...]]:
    """Each row of each round with its attempts, as it is stored."""
    view = mill.tx(show_all_rounds, LOCAL, build.id)
    return {row.id: (*row, *map(tuple, view.attempts.get(row.id, []))) for row in view.steps}


def an_output(path: str, target: str) -> dict[str, str]:
    """A link: an output whose bytes need not be uploaded."""
    return {"path": path, "type": "link", "target": target}


def acquire(mill: Mill, slots: int = 4) -> dict[str, Held]:
    return {held.claim.name: held for held in mill.acquire(mill.a_runner(), slots=slots)}


def end(mill: Mill, held: Held, *, failing: Sequence[str] = (), mark: str = "x") -> None:
    """The step runs and leaves one output that carries the mark, unless it fails."""
    mill.start(held)
    name = held.claim.name
    if name in failing:
        mill.complete(held, "failed", exit_code=3)
    else:
        mill.complete(held, artifacts=[an_output(name, f"{name}-{mark}")])


def run(mill: Mill, *failing: str, mark: str = "x") -> list[str]:
    """Let a runner do all there is to do, the steps named so failing; what it did, in order."""
    runner, done = mill.a_runner(), []
    while held := mill.acquire(runner, slots=4):
        for one in held:
            done.append(one.claim.name)
            end(mill, one, failing=failing, mark=mark)
    return done


def targets(inputs: Sequence[Any]) -> list[str]:
    return [found.target for found in inputs]


def test_failed_and_skipped_steps_run_again_and_the_others_are_kept(mill: Mill) -> None:
    build = mill.a_build(DIAMOND)
    run(mill, "left")
    before = rows(mill, build)

    retry(mill, build)

    after = rows(mill, build)
    assert mill.states(build) == {
        "top": "succeeded",
        "left": "ready",
        "right": "succeeded",
        "bottom": "pending",
    }
    assert rounds_of(mill, build) == {"top": 1, "left": 2, "right": 1, "bottom": 2}
    assert after["top"] == before["top"]
    assert not {after["left"].id, after["bottom"].id} & {row.id for row in before.values()}
    assert run(mill) == ["left", "bottom"]
    assert mill.build(build.id).state == "succeeded"
    assert mill.build(build.id).round == 2


def test_what_ended_in_an_earlier_round_never_changes(mill: Mill) -> None:
    build = mill.a_build(DIAMOND)
    run(mill, "left")
    first = everything(mill, build)

    retry(mill, build)
    run(mill, "bottom")
    second = everything(mill, build)
    retry(mill, build, "all")
    run(mill)

    third = everything(mill, build)
    assert len(first), len(second) == (4, 6)
    assert len(third) == 10
    assert second | first == second
    assert third | second == third


def test_a_fresh_row_is_what_the_step_was_when_the_build_was_made(mill: Mill) -> None:
    spec = [
        a_step("base"),
        a_step("odd", labels=["b", "a"], exclusive=True, env={"A": "1"}, timeoutSeconds=7),
        a_step(
            "behind",
            ["base", "odd"],
            user="image",
            network="none",
            outputPaths=["out"],
            queueTimeoutSeconds=90,
        ),
    ]
    build = mill.a_build(spec)
    made = rows(mill, build)
    labels = {row.label for row in labels_of(mill, made["odd"].id)}
    runner = mill.a_runner("a", "b")
    for held in mill.acquire(runner, slots=2, labels=["a", "b"]):
        mill.heartbeat(runner, held)
        mill.start(held)
        mill.append(held, 0, b"hello")
        mill.complete(held, "failed", exit_code=3)

    mill.clock.advance(60)
    retry(mill, build)

    own = {"id", "round", "ready_at"}
    for name, row in rows(mill, build).items():
        again = {key: value for key, value in row._asdict().items() if key not in own}
        assert again == {key: value for key, value in made[name]._asdict().items() if key not in own}, name
        assert row.ready_at == (mill.clock() if name != "behind" else None)
    assert {row.label for row in labels_of(mill, rows(mill, build)["odd"].id)} == labels == {"a", "b"}


def labels_of(mill: Mill, step_id: str) -> list[Any]:
    label_rows = table_of(StepLabel)
    statement = select(label_rows).where(label_rows.c.step_id == step_id)
    return mill.tx(lambda tx: list(tx.connection().execute(statement)))


def test_new_rows_depend_on_what_is_kept_what_is_carried_and_what_is_new(mill: Mill) -> None:
    build = mill.a_build(a_spec(kept=[], bad=[], runs=[], behind=["kept", "bad", "runs"], last=["behind"]))
    held = acquire(mill)
    end(mill, held["kept"])
    end(mill, held["bad"], failing=["bad"])
    mill.start(held["runs"])

    retry(mill, build)

    now = {name: row.id for name, row in rows(mill, build).items()}
    arrows = mill.tx(steps.list_dependencies, build.id)
    assert set(arrows[now["behind"]]) == {build.steps["kept"], now["bad"], build.steps["runs"]}
    assert arrows[now["last"]] == [now["behind"]]
    assert rounds_of(mill, build) == {"kept": 1, "bad": 2, "runs": 2, "behind": 2, "last": 2}


def test_new_rows_find_the_outputs_of_what_was_kept_and_of_what_ran_again(mill: Mill) -> None:
    build = mill.a_build(a_spec(kept=[], bad=["kept"], beside=[], last=["bad", "beside"]))
    run(mill, "beside", mark="first")
    retry(mill, build, "all")
    run(mill, "bad", mark="second")
    retry(mill, build)

    bad = acquire(mill)["bad"]
    end(mill, bad, mark="third")
    last = acquire(mill)["last"]

    assert targets(bad.claim.inputs) == ["kept-second"]
    assert sorted(targets(last.claim.inputs)) == ["bad-third", "beside-second", "kept-second"]


def test_of_two_outputs_at_one_path_the_later_step_wins_whichever_ran_last(mill: Mill) -> None:
    build = mill.a_build(a_spec(early=[], late=[], end=["late", "early"]))
    held = acquire(mill)
    mill.complete(held["early"], "failed")
    mill.complete(held["late"], artifacts=[an_output("same", "late")])
    retry(mill, build)

    mill.complete(acquire(mill)["early"], artifacts=[an_output("same", "early")])

    inputs = acquire(mill)["end"].claim.inputs
    assert targets(inputs) == ["early", "late"], "the last one named is laid on top"


def test_status_and_times_are_those_of_the_latest_round(mill: Mill) -> None:
    build = mill.a_build(a_spec(one=[], two=["one"]))
    mill.complete(acquire(mill)["one"], "failed", reason="timeout")
    assert mill.build(build.id).reason == "timeout"

    mill.clock.advance(60)
    retry(mill, build)
    waiting = mill.build(build.id)
    mill.clock.advance(60)
    held = acquire(mill)["one"]
    running = mill.build(build.id)
    mill.clock.advance(60)
    mill.complete(held, "failed", reason="oom")
    failed = mill.build(build.id)

    assert (waiting.state, waiting.reason, waiting.started_at, waiting.finished_at) == (
        "queued",
        None,
        None,
        None,
    )
    assert (running.state, running.started_at) == ("running", mill.clock() - timedelta(seconds=60))
    assert (failed.state, failed.reason, failed.finished_at) == ("failed", "oom", mill.clock())
    assert failed.created_at == waiting.created_at


def test_the_build_goes_on_while_other_steps_still_run_and_ends_with_all_of_them(mill: Mill) -> None:
    build = mill.a_build(a_spec(bad=[], slow=[], behind=["bad"], beside=["slow"]))
    held = acquire(mill)
    mill.start(held["slow"])
    end(mill, held["bad"], failing=["bad"])
    mill.clock.advance(60)

    retry(mill, build)

    assert mill.states(build) == {"bad": "ready", "slow": "running", "behind": "pending", "beside": "pending"}
    assert rows(mill, build)["slow"].id == build.steps["slow"]
    assert set(rounds_of(mill, build).values()) == {2}
    assert (mill.build(build.id).state, mill.build(build.id).started_at) == ("running", mill.clock())
    assert mill.heartbeat(held["slow"].runner, held["slow"])[0].action is Action.CONTINUE
    mill.complete(held["slow"])
    assert sorted(run(mill)) == ["bad", "behind", "beside"]
    assert mill.build(build.id).state == "succeeded"


def test_a_carried_step_that_fails_fails_the_new_round_and_skips_what_is_behind_it(mill: Mill) -> None:
    build = mill.a_build(a_spec(bad=[], slow=[], behind=["bad", "slow"]))
    held = acquire(mill)
    end(mill, held["bad"], failing=["bad"])
    retry(mill, build)

    end(mill, held["slow"], failing=["slow"])
    assert mill.states(build) == {"bad": "ready", "slow": "failed", "behind": "skipped"}
    run(mill)

    assert mill.build(build.id).state == "failed"
    retry(mill, build)
    assert rounds_of(mill, build) == {"bad": 2, "slow": 3, "behind": 3}
    assert run(mill) == ["slow", "behind"]
    assert mill.build(build.id).state == "succeeded"


def test_a_step_may_fail_and_run_again_while_the_same_other_step_runs_all_the_time(mill: Mill) -> None:
    build = mill.a_build(a_spec(slow=[], bad=[]))
    held = acquire(mill)
    end(mill, held["bad"], failing=["bad"])
    for _ in range(4):
        retry(mill, build)
        run(mill, "bad")
        assert mill.build(build.id).state == "running"

    retry(mill, build)
    end(mill, held["slow"])
    run(mill)

    assert mill.build(build.id).state == "succeeded"
    assert rounds_of(mill, build) == {"slow": 6, "bad": 6}
    assert mill.attempts(build.steps["slow"])[0].outcome == "succeeded"


def test_all_steps_run_again(mill: Mill) -> None:
    build = mill.a_build(DIAMOND)
    run(mill)

    retry(mill, build, "all")

    assert mill.states(build) == {"top": "ready", "left": "pending", "right": "pending", "bottom": "pending"}
    assert run(mill) == ["top", "left", "right", "bottom"]
    assert (mill.build(build.id).state, mill.build(build.id).round) == ("succeeded", 2)


def test_all_steps_run_again_but_for_those_that_a_step_in_a_runners_hands_stands_on(mill: Mill) -> None:
    build = mill.a_build(a_spec(base=[], slow=["base"], other=[], last=["slow", "other"], end=["last"]))
    held = acquire(mill)
    end(mill, held["base"], mark="first")
    end(mill, held["other"], mark="first")
    slow = acquire(mill)["slow"]

    retry(mill, build, "all")

    assert rounds_of(mill, build) == {"base": 1, "slow": 2, "other": 2, "last": 2, "end": 2}
    assert mill.step(build.steps["last"]).round == 2, "what waits is carried and waits for the new row"
    end(mill, slow, mark="first")
    assert mill.states(build)["last"] == "pending"
    assert run(mill, mark="second") == ["other", "last", "end"]
    assert mill.build(build.id).state == "succeeded"
    assert mill.attempts(build.steps["other"])[0].outcome == "succeeded"


def test_a_step_that_waited_is_given_the_outputs_of_the_new_row(mill: Mill) -> None:
    build = mill.a_build(a_spec(slow=[], other=[], last=["slow", "other"]))
    held = acquire(mill)
    end(mill, held["other"], mark="first")
    retry(mill, build, "all")

    end(mill, held["slow"], mark="first")
    end(mill, acquire(mill)["other"], mark="second")

    assert targets(acquire(mill)["last"].claim.inputs) == ["slow-first", "other-second"]


def test_the_list_of_artifacts_shows_each_step_once_and_the_replaced_ones_can_be_had_by_id(
    mill: Mill,
) -> None:
    build = mill.a_build(a_spec(one=[], two=["one"]))
    run(mill, "two", mark="first")
    first = mill.tx(list_artifacts, LOCAL, build.id)

    retry(mill, build, "all")
    assert mill.tx(list_artifacts, LOCAL, build.id) == []
    run(mill, mark="second")

    assert targets(first) == ["one-first"]
    assert sorted(targets(mill.tx(list_artifacts, LOCAL, build.id))) == ["one-second", "two-second"]
    assert mill.tx(show_artifact, LOCAL, first[0].id) == first[0]


def test_the_log_of_an_earlier_round_can_still_be_read(mill: Mill) -> None:
    build = mill.a_build()
    held = acquire(mill)["test"]
    mill.start(held)
    mill.append(held, 0, b"first")
    mill.complete(held, "failed")

    retry(mill, build)
    again = acquire(mill)["test"]
    mill.start(again)
    mill.append(again, 0, b"again!")

    old = mill.tx(show_step_log, mill.site, LOCAL, held.step_id, attempt=None)
    new = mill.tx(show_step_log, mill.site, LOCAL, again.step_id, attempt=None)
    assert (old.path.read_bytes(), old.is_open) == (b"first", False)
    assert (new.path.read_bytes()[: new.size], new.is_open) == (b"again!", True)


def test_a_build_in_which_nothing_failed_has_nothing_to_run_again(mill: Mill) -> None:
    build = mill.a_build(a_spec(one=[], two=["one"]))

    for which in ("failed", "all"):
        with pytest.raises(Conflict, match="nothing to run again"):
            retry(mill, build, which)
    end(mill, acquire(mill)["one"])
    with pytest.raises(Conflict, match="nothing to run again"):
        retry(mill, build)
    end(mill, acquire(mill)["two"])
    run(mill)
    with pytest.raises(Conflict, match="nothing to run again"):
        retry(mill, build)

    assert (mill.build(build.id).state, mill.build(build.id).round) == ("succeeded", 1)


def test_a_build_that_was_never_started_is_not_retried(mill: Mill) -> None:
    build = mill.a_build()
    change = update(table_of(Build)).where(table_of(Build).c.id == build.id).values(state="created")
    mill.tx(lambda tx: tx.connection().execute(change).rowcount)

    with pytest.raises(Conflict, match="not been started"):
        retry(mill, build, "all")


def test_a_build_that_is_being_cancelled_is_not_retried_until_it_has_ended(mill: Mill) -> None:
    build = mill.a_build(a_spec(runs=[], waits=["runs"]))
    held = acquire(mill)["runs"]
    mill.start(held)
    first = cancel(mill, build)

    with pytest.raises(Conflict, match="being stopped"):
        retry(mill, build)
    mill.complete(held, "failed", reason="cancelled")
    retry(mill, build)

    assert mill.states(build) == {"runs": "ready", "waits": "pending"}
    assert mill.build(build.id).cancel_requested_at is None
    assert run(mill) == ["runs", "waits"]
    assert mill.build(build.id).state == "succeeded"
    assert first


def test_a_build_that_is_out_of_time_is_not_retried_until_it_has_ended_and_then_has_its_time_again(
    mill: Mill,
) -> None:
    build = mill.a_build(a_spec(runs=[], waits=["runs"]), timeout_seconds=300)
    held = acquire(mill)["runs"]
    mill.start(held)
    assert overdue(mill) == 0
    mill.clock.advance(301)
    assert overdue(mill) == 1

    with pytest.raises(Conflict, match="being stopped"):
        retry(mill, build)
    mill.complete(held, "failed", reason="cancelled")
    assert mill.build(build.id).reason == "build_timeout"
    retry(mill, build)

    held = acquire(mill)["runs"]
    assert overdue(mill) == 0
    mill.clock.advance(299)
    assert overdue(mill) == 0
    mill.complete(held)
    assert run(mill) == ["waits"]
    assert mill.build(build.id).state == "succeeded"


def overdue(mill: Mill) -> int:
    return mill.now(stop_overdue_builds, mill.site)


def test_a_step_that_is_out_of_time_is_carried_and_fails_the_new_round(mill: Mill) -> None:
    build = mill.a_build([a_step("bad"), a_step("slow", timeoutSeconds=7)])
    held = acquire(mill)
    mill.start(held["slow"])
    end(mill, held["bad"], failing=["bad"])
    mill.tx(stops.request_stop, held["slow"].step_id, 1, reason="timeout", now=mill.clock())

    retry(mill, build)
    assert run(mill) == ["bad"]
    mill.complete(held["slow"], "failed", reason="timeout")

    assert (mill.build(build.id).state, mill.build(build.id).reason) == ("failed", "timeout")
    assert rounds_of(mill, build) == {"bad": 2, "slow": 2}


def test_a_round_is_cancelled_without_touching_the_rows_of_earlier_ones(mill: Mill) -> None:
    build = mill.a_build(a_spec(good=[], bad=[], behind=["bad"]))
    run(mill, "bad")
    first = cancel_after_retry(mill, build)
    before = everything(mill, build)
    second = cancel_after_retry(mill, build)

    assert before.items() <= everything(mill, build).items()
    assert len({first, second}) == 2
    assert mill.build(build.id).state == "cancelled"
    assert mill.states(build) == {"good": "succeeded", "bad": "cancelled", "behind": "cancelled"}
    with pytest.raises(Conflict):
        retry(mill, build)
        end(mill, acquire(mill)["bad"])
        end(mill, acquire(mill)["behind"])
        cancel(mill, build)
    assert mill.build(build.id).state == "succeeded"


def cancel_after_retry(mill: Mill, build: MadeBuild) -> str:
    retry(mill, build)
    held = acquire(mill)["bad"]
    receipt = cancel(mill, build)
    assert cancel(mill, build) == receipt
    mill.complete(held, "failed", reason="cancelled")
    return receipt


def test_a_late_word_about_an_earlier_round_changes_nothing(mill: Mill) -> None:
    build = mill.a_build(a_spec(test=[], other=[]))
    held = acquire(mill)
    first = mill.complete(held["test"], "failed", exit_code=3)
    retry(mill, build)
    before = everything(mill, build)

    said_again = mill.complete(held["test"], "failed", exit_code=3)
    said_otherwise = mill.complete(held["test"])
    bare = mill.now(complete_bare_step, mill.site, LOCAL, held["test"].step_id, Completion(status="success"))

    assert said_again == first
    assert (said_otherwise.is_same, said_otherwise.state) == (False, "failed")
    assert (bare.is_same, bare.state) == (False, "failed")
    with pytest.raises(StaleAttempt):
        mill.append(held["test"], 0, b"late")
    assert everything(mill, build) == before


def test_a_runner_that_comes_back_for_a_lost_step_of_an_earlier_round_is_told_to_abandon_it(
    mill: Mill,
) -> None:
    mill.clock.advance(100)
    held = mill.a_running_step([a_step("deploy", exclusive=True)])
    build = MadeBuild(held.claim.build_id, held.claim.project_id, "", {})
    mill.clock.advance(301)
    mill.expire()
    assert mill.build(build.id).reason == "runner_lost"

    retry(mill, build)
    again = acquire(mill)["deploy"]

    assert mill.heartbeat(held.runner, held)[0].action is Action.ABANDON
    assert mill.start(again).action == "go"
    mill.complete(again)
    assert mill.build(build.id).state == "succeeded"


def test_a_carried_step_whose_runner_falls_silent_runs_again_in_the_new_round(mill: Mill) -> None:
    mill.clock.advance(100)
    build = mill.a_build(a_spec(bad=[], slow=[]))
    held = acquire(mill)
    mill.start(held["slow"])
    end(mill, held["bad"], failing=["bad"])
    retry(mill, build)

    mill.clock.advance(61)
    assert mill.expire() == 1
    assert mill.states(build)["slow"] == "ready"
    mill.clock.advance(61)
    assert sorted(run(mill)) == ["bad", "slow"]

    assert mill.build(build.id).state == "succeeded"
    assert mill.step(held["slow"].step_id).attempt == 2


def test_the_definition_is_the_copied_one_and_the_commit_stays(mill: Mill) -> None:
    build = mill.a_build(a_spec(test=[]), repo_url="https://example.org/r.git", branch="main")
    mill.now(builds.bind_commit, build.id, "a" * 40)
    run(mill, "test")
    mill.now(
        change_workflow,
        mill.site,
        LOCAL,
        build.project_id,
        build.workflow_id,
        name="changed",
        steps=a_spec(other=[]),
    )

    retry(mill, build)

    held = acquire(mill)["test"]
    assert "echo hello" in held.claim.script
    assert held.claim.source is not None
    assert held.claim.source.commit == "a" * 40
    assert mill.build(build.id).commit_hash == "a" * 40


def test_a_bare_client_can_end_the_steps_of_a_new_round(mill: Mill) -> None:
    build = mill.a_build(a_spec(one=[], two=["one"]))
    run(mill, "one")
    retry(mill, build)

    for name in ("one", "two"):
        step_id = rows(mill, build)[name].id
        mill.now(complete_bare_step, mill.site, LOCAL, step_id, Completion(status="success"))

    assert mill.build(build.id).state == "succeeded"


def test_a_build_whose_project_has_gone_is_not_retried(mill: Mill) -> None:
    build = mill.a_build()
    run(mill, "test")
    mill.now(delete_project, LOCAL, build.project_id)

    with pytest.raises(NotFound):
        retry(mill, build)


def test_a_build_whose_outputs_have_expired_runs_again_only_as_a_whole(mill: Mill) -> None:
    build = mill.a_build([a_step("kept", outputPaths=["kept"]), a_step("bad", ["kept"])])
    run(mill, "bad")
    change = update(table_of(Build)).values(artifacts_expired_round=1)
    mill.tx(lambda tx: tx.connection().execute(change).rowcount)

    with pytest.raises(Conflict, match="have expired"):
        retry(mill, build)
    mill.clock.advance(1)
    retry(mill, build, "all")

    assert run(mill, "bad") == ["kept", "bad"]
    retry(mill, build)
    assert run(mill) == ["bad"]


def test_a_build_does_not_grow_without_end(mill: Mill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_build_module, "MAX_ROWS", 3)
    build = mill.a_build()
    for _ in range(2):
        run(mill, "test")
        retry(mill, build)
    run(mill, "test")

    with pytest.raises(Conflict, match="3 are the most"):
        retry(mill, build)

    assert mill.build(build.id).state == "failed"


def test_a_retry_is_written_down(mill: Mill) -> None:
    build = mill.a_build(DIAMOND)
    run(mill, "left")

    retry(mill, build)

    (record,) = mill.audited("build.retried")
    assert (record.project_id, record.actor) == (build.project_id, "local")
    assert record.details == {
        "buildId": build.id,
        "round": 2,
        "steps": "failed",
        "rerun": 2,
        "carried": 0,
        "stateBefore": "failed",
        "reasonBefore": "exit_nonzero",
    }


def test_of_retries_at_the_same_moment_one_opens_the_round_and_the_others_are_refused(mill: Mill) -> None:
    for which in ("failed", "all", "failed", "all"):
        build = mill.a_build(a_spec(bad=[], behind=["bad"]))
        run(mill, "bad")

        answers = together(*[lambda build=build, which=which: retry(mill, build, which)] * 3)

        assert [type(answer) for answer in answers if isinstance(answer, Exception)] == [Conflict] * 2
        assert mill.build(build.id).round == 2
        assert run(mill) == ["bad", "behind"]
        assert mill.build(build.id).state == "succeeded"


def test_a_retry_that_meets_completions_loses_none_of_them(mill: Mill) -> None:
    for number in range(6):
        build = mill.a_build(a_spec(bad=[], slow=[], other=[], behind=["bad", "slow"], last=["behind"]))
        held = acquire(mill)
        end(mill, held["bad"], failing=["bad"])
        mill.start(held["slow"])
        mill.start(held["other"])

        answers = together(
            lambda build=build: retry(mill, build),
            lambda held=held: mill.complete(held["slow"]),
            lambda held=held, number=number: mill.complete(
                held["other"], *(["failed"] if number % 2 else [])
            ),
        )

        assert not [answer for answer in answers if isinstance(answer, Exception)]
        if number % 2:
            with_other = rows(mill, build)["other"].state != "failed"
            assert rows(mill, build)["other"].round == 2
            run(mill)
            if not with_other:
                retry(mill, build)
                run(mill)
        else:
            run(mill)
        assert set(mill.states(build).values()) == {"succeeded"}
        assert mill.build(build.id).state == "succeeded"


def test_a_retry_that_meets_the_end_of_its_build_is_right_before_and_after(mill: Mill) -> None:
    for _ in range(6):
        build = mill.a_build(a_spec(bad=[], slow=[]))
        held = acquire(mill)
        end(mill, held["bad"], failing=["bad"])
        mill.start(held["slow"])

        together(lambda build=build: retry(mill, build), lambda held=held: mill.complete(held["slow"]))

        found = mill.build(build.id)
        assert (found.round, found.finished_at) == (2, None)
        assert found.state in ("queued", "running")
        assert run(mill) == ["bad"]
        assert mill.build(build.id).state == "succeeded"


def test_a_retry_that_meets_a_cancel_leaves_a_cancelled_build_or_a_refused_retry(mill: Mill) -> None:
    for _ in range(6):
        build = mill.a_build(a_spec(bad=[], slow=[], behind=["bad"]))
        held = acquire(mill)
        end(mill, held["bad"], failing=["bad"])

        retried, cancelled = together(
            lambda build=build: retry(mill, build), lambda build=build: cancel(mill, build)
        )

        assert isinstance(cancelled, str)
        assert mill.build(build.id).state == "cancelling"
        mill.complete(held["slow"], "failed", reason="cancelled")
        assert mill.build(build.id).state == "cancelled"
        bad = rows(mill, build)["bad"]
        is_refused = isinstance(retried, Conflict)
        assert (bad.state, bad.round) == (("failed", 1) if is_refused else ("cancelled", 2))
        assert run(mill) == []


def test_a_retry_that_meets_acquires_loses_no_claim_and_says_that_the_build_runs(mill: Mill) -> None:
    runners = [mill.a_runner() for _ in range(3)]
    for _ in range(6):
        build = mill.a_build(a_spec(bad=[], one=[], two=[], three=[]))
        end(mill, mill.acquire(runners[0])[0], failing=["bad", "one", "two", "three"])

        answers = together(
            lambda build=build: retry(mill, build),
            *[lambda runner=runner: mill.acquire(runner, slots=2) for runner in runners],
        )

        assert not [answer for answer in answers if isinstance(answer, CoordinatorError)]
        held = [one for answer in answers[1:] for one in answer]  # type: ignore[union-attr]
        assert mill.build(build.id).state == "running" if held else "queued"
        assert len({one.step_id for one in held}) == len(held)
        for one in held:
            end(mill, one)
        run(mill)
        assert mill.build(build.id).state == "succeeded"
        assert mill.build(build.id).started_at is not None


def test_no_step_of_a_retried_build_ended_twice(mill: Mill) -> None:
    build = mill.a_build(DIAMOND)
    for failing, which in (("left", "failed"), ("bottom", "all"), ("right", "failed")):
        run(mill, failing)
        retry(mill, build, which)
    run(mill)

    ended = [row.details["stepId"] for row in mill.audited("step.finished")]
    attempts = table_of(StepAttempt)
    count = mill.tx(lambda tx: len(tx.connection().execute(select(attempts.c.step_id)).all()))
    assert len(ended) == len(set(ended)) == count
    names = select(table_of(Step).c.name, table_of(Step).c.round)
    found = mill.tx(lambda tx: tx.connection().execute(names).all())
    assert len(found) == len(set(found))


def test_over_http_the_answer_is_the_build_in_its_new_round(api: Api) -> None:
    held = api.an_acquired_step(a_spec(test=[], behind=["test"]))
    held.complete("failed", exitCode=3)
    build_id = held.claim["buildId"]
    before = api.build(build_id)

    answer = api.post(f"/api/builds/{build_id}/retry", {"steps": "failed"}, status=200)

    assert answer == api.build(build_id)
    assert (before["status"], before["statusReason"], before["round"]) == ("FAILED", "exit_nonzero", 1)
    assert (answer["status"], answer["round"]) == ("PENDING", 2)
    assert not {"statusReason", "startedAt", "finishedAt"} & set(answer)
    assert [(step["name"], step["status"], step["round"]) for step in answer["steps"]] == [
        ("test", "PENDING", 2),
        ("behind", "PENDING", 2),
    ]


def test_over_http_the_rows_of_every_round_can_be_read(api: Api) -> None:
    held = api.an_acquired_step()
    held.complete("failed", exitCode=3)
    build_id = held.claim["buildId"]
    (before,) = api.build(build_id)["steps"]
    api.post(f"/api/builds/{build_id}/retry", {"steps": "all"}, status=200)

    every = api.get(f"/api/builds/{build_id}?rounds=all")
    latest = api.get(f"/api/builds/{build_id}?rounds=latest")

    assert latest == api.build(build_id)
    assert every["steps"] == [before, *latest["steps"]]
    assert every["steps"][0]["attempts"][0]["exitCode"] == 3
    assert api.get(f"/api/builds/{build_id}?rounds=1", status=400)["details"][0]["path"] == "rounds"


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "steps"),
        ({"steps": "some"}, "steps"),
        ({"steps": None}, "steps"),
        ({"steps": ["test"]}, "steps"),
        ({"steps": "all", "force": True}, "force"),
        ([], "body"),
    ],
)
def test_over_http_any_other_wish_is_refused_and_named(api: Api, body: Any, path: str) -> None:
    build_id = api.a_build()["id"]

    said = api.post(f"/api/builds/{build_id}/retry", body, status=400)

    assert [detail["path"] for detail in said["details"]] == [path]
    assert api.build(build_id)["round"] == 1


def test_over_http_what_cannot_be_retried_is_a_conflict_and_what_is_not_there_not_found(api: Api) -> None:
    build_id = api.a_build()["id"]

    conflict = api.post(f"/api/builds/{build_id}/retry", {"steps": "failed"}, status=409)
    missing = api.post("/api/builds/nope/retry", {"steps": "failed"}, status=404)

    assert (conflict["code"], missing["code"]) == ("conflict", "not_found")
    assert "nothing to run again" in conflict["error"]
