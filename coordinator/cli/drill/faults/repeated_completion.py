"""A completion arrives twice, and then once more with another outcome: it may count once."""

import hashlib

from coordinator.cli.drill.bare_runner import BareRunner
from coordinator.cli.drill.checker import Wanted
from coordinator.cli.drill.errors import NotSeen
from coordinator.cli.drill.result import Finding, Kind, Seen
from coordinator.cli.drill.stage import Stage
from coordinator.cli.drill.workload import numbered_line, numbered_step
from shared.protocol import Claim

NAME = "repeated-completion"
ABOUT = "a completion arrives twice, and then with another outcome"
LINES = 20
TRIES = 6


def cause(stage: Stage) -> Seen:
    """The same answer each time, one end in the trail, and the step behind is handed out once."""
    steps = [
        numbered_step(stage.drill, "a", lines=LINES, keeps=False),
        numbered_step(stage.drill, "b", lines=LINES, depends_on=["a"], keeps=False),
    ]
    build = stage.submit(steps)
    client = stage.bare_runner()
    findings: list[Finding] = []
    for name in ("a", "b"):
        claim = take_one(client, name, findings)
        findings += _end_it_three_times(stage, client, claim, build)
    history, wrong = stage.look_back(build, {name: Wanted(LINES, keeps=False) for name in ("a", "b")})
    return Seen((), (*findings, *wrong), (history,), "6 completions, 2 effects; other bytes in a log refused")


def take_one(client: BareRunner, name: str, findings: list[Finding]) -> Claim:
    """The one step that is ready; more of them are a finding."""
    for _ in range(TRIES):
        claims = client.take(slots=8)
        if claims:
            if len(claims) > 1:
                told = ", ".join(claim.name for claim in claims)
                findings.append(Finding(Kind.DUPLICATE, f"{len(claims)} steps were handed out: {told}"))
            return claims[0]
    raise NotSeen(f"step {name} is not handed out")


def log_of(stage: Stage, claim: Claim, lines: int) -> bytes:
    """What the script would have printed."""
    numbers = range(1, lines + 1)
    told = [numbered_line(stage.drill, claim.name, claim.attempt, "bare", number) for number in numbers]
    return b"".join(line + b"\n" for line in told)


def _end_it_three_times(stage: Stage, client: BareRunner, claim: Claim, build: str) -> list[Finding]:
    findings = []
    log = log_of(stage, claim, LINES)
    half = len(log) // 2
    client.start(claim)
    client.append(claim, 0, log[:half])
    client.append(claim, 0, log)  # the same bytes again, and the rest
    other = client.append(claim, 0, log.replace(b"bare", b"BARE"))
    if other.status != 409:
        findings.append(Finding(Kind.WRONG, f"other bytes at a known place of a log: {other.status}"))
    whole = {"logSize": len(log), "logSha256": hashlib.sha256(log).hexdigest(), "exitCode": 0}
    first = client.complete(claim, "success", **whole)
    if first.status != 200 or first.body.get("success") is not True:
        findings.append(Finding(Kind.LOSS, f"the completion of {claim.name} is refused: {first}"))
    before = stage.api.history(stage.project_id, build)
    second = client.complete(claim, "success", **whole)
    if second != first:
        findings.append(Finding(Kind.DUPLICATE, f"said again, the completion gets another answer: {second}"))
    flipped = client.complete(claim, "failed", exitCode=1, reason="exit_nonzero")
    if flipped.status == 200 and flipped.body.get("success") is not False:
        findings.append(Finding(Kind.DUPLICATE, f"a second, other outcome was taken: {flipped}"))
    if stage.api.history(stage.project_id, build) != before:
        findings.append(Finding(Kind.DUPLICATE, f"a repeated completion of {claim.name} changed the build"))
    return findings
