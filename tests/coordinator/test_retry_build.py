"""A build that runs again: what is run, what is kept, and what counts afterwards."""

from typing import Any

import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.delete_project import delete_project
from coordinator.actions.list_artifacts import list_artifacts
from coordinator.actions.retry_build import StepsToRetry, retry_build
from coordinator.actions.show_artifact import show_artifact
from coordinator.actions.show_build import BuildView, show_all_rounds
from coordinator.errors import Conflict, NotFound, StaleAttempt
from coordinator.store import steps
from tests.factories import LOCAL, Api, Held, MadeBuild, Mill, a_spec, a_step, together

DIAMOND = a_spec(top=[], left=["top"], right=["top"], bottom=["left", "right"])


def retry(mill: Mill, build: MadeBuild, which: str = "failed") -> BuildView:
    return mill.now(retry_build, LOCAL, build.id, StepsToRetry(which))


def cancel(mill: Mill, build: MadeBuild) -> str:
    return mill.now(cancel_build, LOCAL, build.id).cancel_id or ""


def rows(mill: Mill, build: MadeBuild) -> dict[str, Any]:
    """The current picture: the latest row of each name."""
    return {row.name: row for row in mill.tx(steps.list_steps, build.id)}


def run(mill: Mill, build: MadeBuild, *failing: str) -> dict[str, Held]:
    """Let a runner do all there is to do; the steps named so fail. What it held, by name."""
    runner = mill.a_runner()
    done: dict[str, Held] = {}
    while held := mill.acquire(runner, slots=4):
        for one in held:
            done[one.claim.name] = one
            mill.start(one)
            if one.claim.name in failing:
                mill.complete(one, "failed", exit_code=3)
            else:
                mill.complete(one)
    return done


def test_failed_and_skipped_steps_run_again_and_the_others_are_kept(mill: Mill) -> None:
    build = mill.a_build(DIAMOND)
    run(mill, build, "left")
    before = rows(mill, build)

    retry(mill, build)

    after = rows(mill, build)
    assert {name: row.state for name, row in after.items()} == {
        "top": "succeeded",
        "left": "ready",
        "right": "succeeded",
        "bottom": "pending",
    }
    assert {name: row.round for name, row in after.items()} == {"top": 1, "left": 2, "right": 1, "bottom": 2}
    assert after["top"].id == before["top"].id
    assert after["left"].id != before["left"].id
    assert set(run(mill, build)) == {"left", "bottom"}
    assert mill.build(build.id).state == "succeeded"
