"""The whole drill: one fault after the other on one stage, whatever comes of each."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import httpx

from coordinator.cli.drill.errors import DrillError, Skipped
from coordinator.cli.drill.faults import (
    cut_connection,
    full_spool,
    killed_runner,
    late_completion,
    lost_runner,
    repeated_completion,
    wedged_step,
)
from coordinator.cli.drill.faults.repeated_completion import take_one
from coordinator.cli.drill.result import FaultResult, Finding, Kind, Outcome, Seen, judge
from coordinator.cli.drill.stage import Stage
from coordinator.cli.drill.workload import a_step

LEAST_S = 20.0
BROKEN = (DrillError, OSError, subprocess.SubprocessError, httpx.HTTPError)


@dataclass(frozen=True)
class Fault:
    """A fault that can be caused, and what is said of it."""

    name: str
    about: str
    cause: Callable[[Stage], Seen]


FAULTS = tuple(
    Fault(module.NAME, module.ABOUT, module.cause)
    for module in (
        killed_runner,
        repeated_completion,
        late_completion,
        cut_connection,
        full_spool,
        wedged_step,
        lost_runner,  # the longest wait, and the shorter the longer the coordinator has been up
    )
)


def learn_timings(stage: Stage) -> None:
    """What the coordinator tells runners of its timings, learnt from a step that is done by hand."""
    build = stage.submit([a_step(stage.drill, "first", "true")])
    client = stage.bare_runner()
    claim = take_one(client, "first", [])
    client.start(claim)
    client.complete(claim, "success", exitCode=0)
    stage.await_end(build, 10)
    stage.timings = claim.timings
    stage.amnesty_until = time.monotonic() + claim.timings.amnesty_s


def rehearse(
    stage: Stage, faults: Sequence[Fault], *, began: Callable[[Fault], None]
) -> Iterator[FaultResult]:
    """Cause each fault and judge what was seen; one that goes wrong leaves the others their turn."""
    for fault in faults:
        began(fault)
        yield _try(stage, fault, time.monotonic())


def _try(stage: Stage, fault: Fault, started: float) -> FaultResult:
    try:
        if stage.left_s < LEAST_S:
            raise Skipped(f"{max(0.0, stage.left_s):.0f} s are left of the drill's time")
        seen = fault.cause(stage)
    except Skipped as skipped:
        return FaultResult(fault.name, Outcome.SKIPPED, Seen(note=str(skipped)), time.monotonic() - started)
    except BROKEN as error:
        seen = Seen(findings=(Finding(Kind.WRONG, str(error)), *_left_behind(stage)))
    return judge(fault.name, seen, took_s=time.monotonic() - started)


def _left_behind(stage: Stage) -> list[Finding]:
    """After a fault that went wrong: end its builds and its runners, so that the next one begins afresh."""
    try:
        return stage.start_over()
    except BROKEN as error:
        return [Finding(Kind.WRONG, f"cleaning up after it: {error}")]
