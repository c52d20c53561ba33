"""Steps that ignore TERM and whose processes have stopped themselves: a cancel and a time limit end them."""

import time
from datetime import datetime
from typing import Any

from coordinator.cli.drill.result import Figure, Finding, Kind, Seen
from coordinator.cli.drill.stage import Stage
from coordinator.cli.drill.workload import a_step

NAME = "wedged-step"
ABOUT = "steps ignore TERM and have stopped themselves"
GRACE_S = 3
DEFAULT_GRACE_S = 10
BEYOND_S = 5.0
LIMIT_S = 4
HEARD_S = 3.0  # the runner waits for it; what it misses it hears with its next heartbeat

_WEDGE = """\
trap '' TERM INT HUP
echo "drill:{drill}:$BUILDMILL_STEP:$BUILDMILL_ATTEMPT:wedge:1"
( trap '' TERM INT HUP; while :; do sleep 1; done ) &
sleep 0.5
kill -STOP $!
exec sh -c 'trap "" TERM INT HUP; kill -STOP $$; while :; do sleep 1; done'
"""


def cause(stage: Stage) -> Seen:
    """Both are over within their grace and five seconds, and nothing of them is left."""
    grace: dict[str, Any] = {"graceSeconds": GRACE_S} if stage.api.knows_field("graceSeconds") else {}
    grace_s = float(GRACE_S if grace else DEFAULT_GRACE_S)
    script = _WEDGE.format(drill=stage.drill)
    cancelled = stage.submit([a_step(stage.drill, "a", script, **grace)])
    limited = stage.submit([a_step(stage.drill, "b", script, **{**grace, "timeoutSeconds": LIMIT_S})])
    runner = stage.a_runner("one")
    runner.start(stage.wish.address)
    stage.await_lines(cancelled, ["a"], 60)
    stage.await_lines(limited, ["b"], 60)
    time.sleep(1.0)  # they stop themselves half a second after their line

    cancel_id = stage.api.cancel(cancelled)
    asked = time.monotonic()
    patience_s = HEARD_S + grace_s + 5 * BEYOND_S
    stage.await_end(cancelled, patience_s)
    stage.await_end(limited, LIMIT_S + patience_s)
    findings = _ended_as(stage, cancelled, "a", "CANCELLED", "cancelled")
    findings += _ended_as(stage, limited, "b", "FAILED", "timeout")
    stage.until(lambda: not _still_there(stage), patience_s, "waiting for what is left of the steps to go")
    cleaned_s = time.monotonic() - asked
    receipt = _receipt(stage, cancel_id, patience_s)
    findings += [*_unproved(receipt), *stage.end_runner(runner)]
    figures = (
        *_cancel_figures(receipt, grace_s + BEYOND_S),
        Figure("step beyond its limit dead", _ran_s(stage.step(limited, "b")) - LIMIT_S, grace_s + BEYOND_S),
        Figure("machine clean", cleaned_s, max(float(LIMIT_S), HEARD_S) + grace_s + BEYOND_S),
    )
    histories = tuple(stage.api.history(stage.project_id, build) for build in (cancelled, limited))
    return Seen(figures, tuple(findings), histories, f"a grace of {grace_s:g} s")


def _cancel_figures(receipt: dict[str, Any], dead_s: float) -> list[Figure]:
    """By the receipt: the runner hears of the cancel, and then the grace begins."""
    step = receipt["steps"][0]
    if "termAt" not in step or "deadAt" not in step:
        return []
    return [
        Figure("cancel heard", _seconds(receipt["requestedAt"], step["termAt"]), HEARD_S),
        Figure("cancelled step dead", _seconds(step["termAt"], step["deadAt"]), dead_s),
    ]


def _ran_s(step: dict[str, Any]) -> float:
    """How long it ran by the coordinator's clock."""
    return _seconds(step["startedAt"], step["finishedAt"])


def _seconds(began: str, ended: str) -> float:
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(began)).total_seconds()


def _still_there(stage: Stage) -> list[str]:
    """Processes and folders of the steps; what the engine keeps ahead for later ones is none of them."""
    runner = stage.a_runner("one")
    return [what for what in stage.leftovers(runner) if what.startswith(("process", "folder"))]


def _receipt(stage: Stage, cancel_id: str, patience_s: float) -> dict[str, Any]:
    """The receipt of the cancel, once its runner has told everything."""

    def done() -> dict[str, Any]:
        found = stage.api.receipt(cancel_id)
        return found if found["state"] == "done" else {}

    return stage.until(done, patience_s, "waiting for the receipt of the cancel")


def _unproved(receipt: dict[str, Any]) -> list[Finding]:
    """The receipt has to say that it is certain that nothing is left."""
    step = receipt["steps"][0]
    findings = [
        Finding(Kind.LEFTOVER, f"the receipt of the cancel names {what}") for what in step["leftovers"]
    ]
    missing = [name for name in ("termAt", "deadAt", "cleanedAt") if name not in step]
    if missing:
        findings.append(Finding(Kind.WRONG, f"the receipt of the cancel lacks {', '.join(missing)}"))
    if not receipt["confirmed"]:
        findings.append(Finding(Kind.WRONG, "the receipt of the cancel is not confirmed"))
    return findings


def _ended_as(stage: Stage, build: str, name: str, status: str, reason: str) -> list[Finding]:
    step = stage.step(build, name)
    if (step["status"], step.get("reason"), step["attempt"]) == (status, reason, 1):
        return []
    told = f"{step['status']} {step.get('reason')} at attempt {step['attempt']}"
    return [Finding(Kind.WRONG, f"the wedged step {name} ended as {told}, not as {status} {reason}")]
