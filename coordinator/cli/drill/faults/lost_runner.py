"""A runner dies for good: its step runs again elsewhere, and what comes back too late changes nothing."""

import time

from coordinator.cli.drill.checker import Wanted
from coordinator.cli.drill.errors import Skipped
from coordinator.cli.drill.result import Figure, Finding, Kind, Seen
from coordinator.cli.drill.stage import Stage
from coordinator.cli.drill.workload import numbered_step

NAME = "lost-runner"
ABOUT = "a runner dies for good, and comes back too late"
LINES = 40
REQUEUED_S = 10.0
BACKOFF_S = 10.0
AROUND_S = 30.0


def cause(stage: Stage) -> Seen:
    """The step has a second attempt on another runner; the first one, back from the dead, is turned away."""
    needed_s = _patience_s(stage) + BACKOFF_S + AROUND_S
    if needed_s > stage.left_s:
        raise Skipped(
            f"the coordinator gives a silent runner {_patience_s(stage):.0f} s; this fault would take "
            f"{needed_s:.0f} s and {stage.left_s:.0f} s are left"
        )
    steps = [
        numbered_step(stage.drill, "a", lines=LINES),
        numbered_step(stage.drill, "b", lines=5, depends_on=["a"]),
    ]
    build = stage.submit(steps)
    dead, other = stage.a_runner("one"), stage.a_runner("two")
    dead.start(stage.wish.address)
    stage.await_lines(build, ["a"], 60)

    dead.kill()
    died = time.monotonic()
    patience_s = _patience_s(stage)
    other.start(stage.wish.address)

    def is_requeued() -> bool:
        return bool(stage.step(build, "a")["attempts"][0].get("outcome") == "lost")

    what = f"waiting for the coordinator to give the runner up, after {patience_s:.0f} s"
    stage.until(is_requeued, patience_s + 3 * REQUEUED_S, what)
    requeued_s = time.monotonic() - died
    stage.until(
        lambda: stage.step(build, "a")["attempt"] == 2,
        3 * BACKOFF_S,
        "waiting for the other runner to take it",
    )
    dead.start(stage.wish.address)  # too late: somebody else has the step
    stage.await_end(build, 60)
    wanted = {"a": Wanted(LINES, attempts=2), "b": Wanted(5)}
    history, findings = stage.look_back(build, wanted)
    first = next(step for step in history.steps if step.name == "a").attempts[0]
    if first.reason != "runner_lost":
        findings.append(Finding(Kind.WRONG, f"the first attempt ended as {first.reason or first.outcome}"))
    findings += [*stage.end_runner(dead), *stage.end_runner(other)]
    again, _ = stage.look_back(build, wanted)
    if again != history:
        findings.append(Finding(Kind.DUPLICATE, "the runner that came back too late changed the build"))
    figure = Figure("step requeued", requeued_s, patience_s + REQUEUED_S)
    return Seen((figure,), tuple(findings), (history,), "the late runner changed nothing")


def _patience_s(stage: Stage) -> float:
    """How long a runner that falls silent now keeps its steps; longer soon after the coordinator's start."""
    return max(stage.timings.lost_after_s, stage.amnesty_until - time.monotonic())
