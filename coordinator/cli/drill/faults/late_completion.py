"""The completion of an attempt that was superseded arrives: it is refused and changes nothing."""

import hashlib
import time

from coordinator.cli.drill.checker import Wanted
from coordinator.cli.drill.errors import NotSeen, Skipped
from coordinator.cli.drill.faults.repeated_completion import log_of, take_one
from coordinator.cli.drill.result import Figure, Finding, Kind, Seen
from coordinator.cli.drill.stage import Stage
from coordinator.cli.drill.workload import numbered_step

NAME = "late-completion"
ABOUT = "an attempt that was superseded is completed"
LINES = 20
READY_S = 5.0
AROUND_S = 15.0


def cause(stage: Stage) -> Seen:
    """A claim is left lying until it is ready again; then its first holder speaks up."""
    ttl_s = stage.timings.claim_ttl_s
    if ttl_s + AROUND_S > stage.left_s:
        raise Skipped(f"a claim lies for {ttl_s:g} s, and {stage.left_s:.0f} s are left")
    build = stage.submit([numbered_step(stage.drill, "a", lines=LINES, keeps=False)])
    client = stage.bare_runner()
    findings: list[Finding] = []
    stale = take_one(client, "a", findings)
    taken = time.monotonic()
    current = None
    while current is None:
        stage.say(f"waiting for the claim that nobody acknowledged to be ready again, after {ttl_s:g} s")
        current = next(iter(client.take(wait_s=1)), None)
        if time.monotonic() - taken > ttl_s + 3 * READY_S:
            raise NotSeen("the claim is not ready again")
    again_s = time.monotonic() - taken
    client.start(current)
    before = stage.api.history(stage.project_id, build)
    for what, answer in (
        ("completion", client.complete(stale, "success", exitCode=0)),
        ("failure", client.complete(stale, "failed", exitCode=1)),
        ("log", client.append(stale, 0, b"late\n")),
        ("start", client.start(stale)),
    ):
        if answer.status != 409:
            findings.append(Finding(Kind.DUPLICATE, f"the late {what} is answered with {answer.status}"))
    orders = client.heartbeat(stale).body.get("attempts") or [{}]
    if orders[0].get("action") != "abandon":
        findings.append(Finding(Kind.WRONG, f"the late holder is not told to abandon: {orders}"))
    if stage.api.history(stage.project_id, build) != before:
        findings.append(Finding(Kind.DUPLICATE, "a late message changed the build"))
    log = log_of(stage, current, LINES)
    client.append(current, 0, log)
    client.complete(
        current, "success", exitCode=0, logSize=len(log), logSha256=hashlib.sha256(log).hexdigest()
    )
    history, wrong = stage.look_back(build, {"a": Wanted(LINES, attempts=2, keeps=False)})
    figure = Figure("claim ready again", again_s, ttl_s + READY_S)
    return Seen((figure,), (*findings, *wrong), (history,), "409 for each late message")
