"""The disk of a runner fills up while a step prints: a clear end or a recovery, and never a silent loss."""

import os
import subprocess
import time
from pathlib import Path

from coordinator.cli.drill.checker import Wanted
from coordinator.cli.drill.history import SeenStep
from coordinator.cli.drill.result import Figure, Finding, Kind, Seen
from coordinator.cli.drill.stage import Stage
from coordinator.cli.drill.user_api import FINAL
from coordinator.cli.drill.workload import a_step, numbered_step

NAME = "full-spool"
ABOUT = "the disk of a runner fills up while a step prints"
SIZE_MB = 24
LINES = 1500
BURST = 25
FULL_S = 3.0
QUOTA_MB = 8
ENDED_S = 60.0
AGAIN_S = 30.0


def cause(stage: Stage) -> Seen:
    """On a small disk of its own where this user may mount one, else with a quota."""
    state = stage.folder / "small"
    return _fill_disk(stage, state) if _mount_small(state) else _exceed_quota(stage)


def _fill_disk(stage: Stage, state: Path) -> Seen:
    runner = stage.a_runner("small", state=state)
    build = stage.submit([numbered_step(stage.drill, "a", lines=LINES, burst=BURST, keeps=False)])
    runner.start(stage.wish.address)
    stage.await_lines(build, ["a"], 60)

    ballast = state / "ballast"
    _fill(ballast)
    stage.say("the disk is full")
    time.sleep(FULL_S)
    ballast.unlink()
    emptied = time.monotonic()
    stage.await_end(build, 3 * ENDED_S)
    ended_s = time.monotonic() - emptied
    step = stage.step(build, "a")
    history, findings = stage.look_back(build, {"a": _as_it_ended(step)})
    if step["status"] != "SUCCESS" and not step.get("reason"):
        findings.append(Finding(Kind.WRONG, "the step ended without a reason"))
    findings += _runs_again(stage)
    findings += stage.end_runner(runner)
    note = f"{_how_it_went(history.steps[0])}; the runner works again"
    return Seen((Figure("step ended", ended_s, ENDED_S),), tuple(findings), (history,), note)


def _as_it_ended(step: dict[str, object]) -> Wanted:
    """A success has to have every line; anything else has to have no gap in what is there."""
    lines = LINES if step["status"] == "SUCCESS" else None
    return Wanted(lines, status=str(step["status"]), attempts=int(str(step["attempt"])), keeps=False)


def _how_it_went(step: SeenStep) -> str:
    told = [attempt.reason for attempt in step.attempts if attempt.reason]
    if step.status != "SUCCESS":
        return f"the step ended as {step.reason}"
    return f"the step ended as {told[0]} and ran again" if told else "the step went on"


def _exceed_quota(stage: Stage) -> Seen:
    runner = stage.a_runner("small", env={"BUILDMILL_STEP_DISK_MB": str(QUOTA_MB)})
    script = f"dd if=/dev/zero of=fill bs=1048576 count={3 * QUOTA_MB} 2>/dev/null; sleep 60"
    build = stage.submit([a_step(stage.drill, "a", script)])
    runner.start(stage.wish.address)
    began = time.monotonic()
    stage.until(lambda: stage.api.build(build)["status"] in FINAL, ENDED_S, "waiting for the step's end")
    ended_s = time.monotonic() - began
    step = stage.step(build, "a")
    findings = []
    if step.get("reason") != "disk_limit":
        findings.append(Finding(Kind.WRONG, f"the step ended as {step.get('reason') or step['status']}"))
    findings += _runs_again(stage)
    findings += stage.end_runner(runner)
    note = "with a quota, as this user may not mount: ended as disk_limit"
    return Seen((Figure("step ended", ended_s, ENDED_S),), tuple(findings), (), note)


def _runs_again(stage: Stage) -> list[Finding]:
    """The same runner takes another step and loses nothing of it."""
    build = stage.submit([numbered_step(stage.drill, "b", lines=3)])
    stage.await_end(build, AGAIN_S)
    _, findings = stage.look_back(build, {"b": Wanted(3)})
    return findings


def _mount_small(state: Path) -> bool:
    """A small file system in memory; False where this user may not mount one."""
    if os.geteuid() != 0:
        return False
    state.mkdir(mode=0o755)
    options = f"size={SIZE_MB}m,mode=755"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "buildmill-drill", str(state)],
        check=False,
        capture_output=True,
        timeout=30,
    )
    return done.returncode == 0


def _fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        for piece in (1024 * 1024, 4096, 512):
            try:
                for _ in range(2 * SIZE_MB * 1024 * 1024 // piece):
                    file.write(b"\0" * piece)
            except OSError:
                continue  # full: smaller pieces for what is left
