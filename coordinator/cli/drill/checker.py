"""Looks through what was read back for duplicates, losses and a broken order; decides from values alone."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from coordinator.cli.drill.history import History, SeenAttempt, SeenStep
from coordinator.cli.drill.result import Finding, Kind
from coordinator.cli.drill.workload import output_of, read_input, read_line

MOST_NAMED = 5
GAP = b"bytes are missing here"


@dataclass(frozen=True)
class Wanted:
    """How a step has to end: `lines` of None asks only that those which are there have no gap."""

    lines: int | None
    status: str = "SUCCESS"
    attempts: int = 1
    keeps: bool = True


def check_build(history: History, wanted: Mapping[str, Wanted], drill: str) -> list[Finding]:
    """Everything about a build that should not be."""
    steps = {step.name: step for step in history.steps}
    findings = [
        Finding(Kind.LOSS, f"step {name} is not in the build")
        for name in sorted(wanted.keys() - steps.keys())
    ]
    for name in sorted(wanted.keys() & steps.keys()):
        findings += _check_step(steps[name], wanted[name], drill)
        findings += _check_order(steps[name], steps)
        findings += _check_inputs(steps[name], steps)
    if all(want.status == "SUCCESS" for want in wanted.values()) and history.status != "SUCCESS":
        findings.append(Finding(Kind.WRONG, f"the build ended as {history.status}"))
    return findings


def _check_step(step: SeenStep, want: Wanted, drill: str) -> Iterator[Finding]:
    if step.status != want.status:
        reason = f" ({step.reason})" if step.reason else ""
        yield Finding(Kind.WRONG, f"step {step.name} ended as {step.status}{reason}, not as {want.status}")
    if len(step.attempts) > want.attempts:
        told = ", ".join(f"{one.number}: {one.reason or one.outcome}" for one in step.attempts)
        yield Finding(
            Kind.DUPLICATE,
            f"step {step.name} has {len(step.attempts)} attempts, not {want.attempts} ({told})",
        )
    if len(step.attempts) < want.attempts:
        yield Finding(Kind.WRONG, f"step {step.name} has {len(step.attempts)} attempts, not {want.attempts}")
    for attempt in step.attempts:
        is_last = attempt is step.attempts[-1]
        yield from _check_log(step.name, attempt, want.lines if is_last else None, drill, is_sealed=is_last)
    yield from _check_events(step)
    if step.attempts and want.keeps and step.status == "SUCCESS":
        yield from _check_artifact(step, drill)


def _check_log(
    name: str, attempt: SeenAttempt, lines: int | None, drill: str, *, is_sealed: bool
) -> Iterator[Finding]:
    where = f"step {name}, attempt {attempt.number}"
    yield from _check_bytes(where, attempt, is_sealed=is_sealed)
    numbers: list[int] = []
    runs: set[str] = set()
    told = attempt.log.splitlines()
    for place, line in enumerate(told):
        if not line.startswith(f"drill:{drill}:".encode()):
            continue
        said = read_line(line)
        if said is None:
            if place < len(told) - 1 and not _is_told_gap(attempt, told[place + 1]):
                yield Finding(Kind.LOSS, f"{where}: a line is mangled: {line[:80]!r}")
            continue
        _, of_step, of_attempt, run, number = said
        if (of_step, of_attempt) != (name, attempt.number):
            yield Finding(Kind.WRONG, f"{where}: a line of {of_step}, attempt {of_attempt}, is in its log")
            continue
        runs.add(run)
        numbers.append(number)
    if len(runs) > 1:
        yield Finding(Kind.DUPLICATE, f"{where}: the script ran {len(runs)} times")
    yield from _check_numbers(where, numbers, lines)


def _is_told_gap(attempt: SeenAttempt, line: bytes) -> bool:
    """What had no room, or was never delivered, may end in the middle of a line, as long as that is said."""
    return attempt.log_state == "gap" and line.startswith(b"[buildmill] ") and GAP in line


def _check_numbers(where: str, numbers: list[int], lines: int | None) -> Iterator[Finding]:
    seen = Counter(numbers)
    last = max(numbers, default=0) if lines is None else lines
    missing = [number for number in range(1, last + 1) if number not in seen]
    if missing:
        yield Finding(Kind.LOSS, f"{where}: {len(missing)} of {last} lines are missing: {_some(missing)}")
    beyond = sorted(number for number in seen if number > last)
    if beyond:
        yield Finding(Kind.WRONG, f"{where}: lines nobody printed: {_some(beyond)}")
    twice = sorted(number for number, times in seen.items() if times > 1)
    if twice:
        yield Finding(Kind.DUPLICATE, f"{where}: {len(twice)} lines are there twice: {_some(twice)}")
    elif numbers != sorted(numbers):
        yield Finding(Kind.ORDER, f"{where}: the lines are not in their order")


def _check_bytes(where: str, attempt: SeenAttempt, *, is_sealed: bool) -> Iterator[Finding]:
    if len(attempt.log) != attempt.log_size:
        yield Finding(
            Kind.LOSS, f"{where}: its log has {len(attempt.log)} bytes, and {attempt.log_size} are recorded"
        )
    if attempt.log_sha256 and hashlib.sha256(attempt.log).hexdigest() != attempt.log_sha256:
        yield Finding(Kind.LOSS, f"{where}: its log has another digest than the one recorded")
    if is_sealed and attempt.outcome == "succeeded" and not attempt.log_sha256:
        yield Finding(Kind.LOSS, f"{where}: its log was never sealed")
    if is_sealed and attempt.outcome == "succeeded" and attempt.log_state != "complete":
        yield Finding(Kind.LOSS, f"{where}: its log is {attempt.log_state}, not complete")


def _check_events(step: SeenStep) -> Iterator[Finding]:
    """In the trail an attempt is claimed, started and finished once at most."""
    for word in ("step.claimed", "step.started", "step.finished"):
        times = Counter(attempt for event, attempt in step.events if event == word)
        for attempt, count in sorted(times.items()):
            if count > 1:
                what = f"step {step.name}, attempt {attempt}: {word} is {count} times in the trail"
                yield Finding(Kind.DUPLICATE, what)
    finished = [event for event, _ in step.events if event == "step.finished"]
    if len(finished) > 1:
        yield Finding(Kind.DUPLICATE, f"step {step.name} finished {len(finished)} times")


def _check_artifact(step: SeenStep, drill: str) -> Iterator[Finding]:
    """The output has to hold the numbered lines of the log, byte for byte."""
    found = [artifact for artifact in step.artifacts if artifact.path == output_of(step.name)]
    if not found:
        yield Finding(Kind.LOSS, f"step {step.name}: its output is missing")
        return
    if len(found) > 1:
        yield Finding(Kind.DUPLICATE, f"step {step.name}: its output is there {len(found)} times")
    artifact = found[0]
    if hashlib.sha256(artifact.data).hexdigest() != artifact.sha256:
        yield Finding(Kind.LOSS, f"step {step.name}: its output has another digest than the one recorded")
    prefix = f"drill:{drill}:".encode()
    printed = [line for line in step.attempts[-1].log.splitlines() if line.startswith(prefix)]
    if artifact.data.splitlines() != printed:
        yield Finding(
            Kind.DUPLICATE if len(artifact.data.splitlines()) > len(printed) else Kind.LOSS,
            f"step {step.name}: its output and its log do not hold the same lines",
        )


def _check_order(step: SeenStep, steps: Mapping[str, SeenStep]) -> Iterator[Finding]:
    for name in step.depends_on:
        before = steps.get(name)
        if step.started_at and (before is None or not before.finished_at):
            yield Finding(Kind.ORDER, f"step {step.name} started although {name} has not finished")
        elif before is not None and step.started_at and step.started_at < before.finished_at:
            yield Finding(Kind.ORDER, f"step {step.name} started before {name} had finished")


def _check_inputs(step: SeenStep, steps: Mapping[str, SeenStep]) -> Iterator[Finding]:
    """What a step found of its dependencies is what they left."""
    if step.status != "SUCCESS" or not step.attempts:
        return
    found = {
        said[2]: said[3]
        for line in step.attempts[-1].log.splitlines()
        if (said := read_input(line)) is not None
    }
    for name in step.depends_on:
        left = {one.path: one.sha256 for one in steps[name].artifacts} if name in steps else {}
        if output_of(name) in left and found.get(name) != left[output_of(name)]:
            yield Finding(Kind.LOSS, f"step {step.name} did not find what {name} left")


def _some(numbers: list[int]) -> str:
    more = " ..." if len(numbers) > MOST_NAMED else ""
    return ", ".join(str(number) for number in numbers[:MOST_NAMED]) + more
