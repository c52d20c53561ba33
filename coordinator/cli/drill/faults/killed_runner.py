"""The drill's runner is killed while steps run, and started again: it has to go on with them."""

import time

from coordinator.cli.drill.checker import Wanted
from coordinator.cli.drill.result import Figure, Seen
from coordinator.cli.drill.stage import Stage
from coordinator.cli.drill.workload import ABREAST, layered_build

NAME = "killed-runner"
ABOUT = "a runner is killed while steps run, and started again"
LINES = 40
ADOPTED_S = 10.0
AWAY_S = 1.0


def cause(stage: Stage) -> Seen:
    """Every step has one attempt, its log has no gap, and its output holds every line once."""
    build = stage.submit(layered_build(stage.drill, stage.wish.steps, lines=LINES))
    first = [f"s{number}" for number in range(1, min(ABREAST, stage.wish.steps) + 1)]
    runner = stage.a_runner()
    runner.start(stage.wish.address)
    stage.await_lines(build, first, 60)

    runner.kill()
    time.sleep(AWAY_S)  # the steps go on, and nobody reads what they say
    before = _log_sizes(stage, build)
    restarted = time.monotonic()
    runner.start(stage.wish.address)

    def is_adopted() -> bool:
        now = _log_sizes(stage, build)
        return all(now[name] > before[name] for name in first)

    stage.until(is_adopted, 60, "waiting for the new process to go on with the steps")
    adopted_s = time.monotonic() - restarted
    stage.await_end(build, 30 + 10 * stage.wish.steps)
    wanted = {f"s{number}": Wanted(LINES) for number in range(1, stage.wish.steps + 1)}
    history, findings = stage.look_back(build, wanted)
    findings += stage.end_runner(runner)
    figure = Figure("steps adopted", adopted_s, ADOPTED_S)
    note = f"{stage.wish.steps} steps, {len(first)} of them running at the kill"
    return Seen((figure,), tuple(findings), (history,), note)


def _log_sizes(stage: Stage, build: str) -> dict[str, int]:
    return {step["name"]: step["logSize"] for step in stage.api.build(build)["steps"]}
