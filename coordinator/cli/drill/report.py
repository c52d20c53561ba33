"""What the operator reads: a line of progress, a table, a verdict; and the whole record as JSON."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from coordinator.cli.drill.rehearsal import Fault
from coordinator.cli.drill.result import FaultResult, Kind, Outcome, is_clean

COLOURS = {Outcome.HELD: "green", Outcome.BROKEN: "red", Outcome.SKIPPED: "yellow"}
WIDTH = 20
PROGRESS_EVERY_S = 0.5


class Screen:
    """Writes line by line; on a terminal the last line says what is being waited for."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()
        self._began = self._shown_at = time.monotonic()
        self._fault = ""

    def line(self, text: str = "") -> None:
        self._wipe()
        click.echo(text)

    def begin(self, fault: Fault) -> None:
        self._fault, self._began = fault.name, time.monotonic()
        self.progress(fault.about)

    def progress(self, what: str) -> None:
        """Shown and overwritten on a terminal, left out elsewhere."""
        now = time.monotonic()
        if not self._is_terminal or now - self._shown_at < PROGRESS_EVERY_S:
            return
        self._shown_at = now
        columns = shutil.get_terminal_size().columns
        self._wipe()
        click.echo(f"{self._fault:<{WIDTH}} {now - self._began:4.0f} s  {what}"[: columns - 1], nl=False)

    def _wipe(self) -> None:
        if self._is_terminal:
            click.echo("\r\x1b[2K", nl=False)


def header_line() -> str:
    return f"{'fault':<{WIDTH}} {'result':<8} {'took':>6}  measured, and promised"


def rows_of(result: FaultResult) -> list[str]:
    """The table's lines for one fault: its figures, its note, and whatever should not have been."""
    told = [
        f"{one.name} after {one.measured_s:.1f} s ({one.promised_s:.0f} s)" for one in result.seen.figures
    ]
    told += [result.seen.note] if result.seen.note else []
    outcome = click.style(f"{result.outcome:<8}", fg=COLOURS[result.outcome])
    first = f"{result.fault:<{WIDTH}} {outcome} {result.took_s:4.0f} s  {told[0] if told else ''}".rstrip()
    indent = " " * (WIDTH + 18)
    findings = [f"{finding.kind}: {finding.what}" for finding in result.seen.findings]
    return [first, *(indent + line for line in told[1:]), *(indent + "! " + line for line in findings)]


def verdict_line(results: Sequence[FaultResult], *, took_s: float) -> str:
    """One sentence that says whether every promise was kept."""
    count = Counter(finding.kind for result in results for finding in result.seen.findings)
    kept = sum(result.outcome is Outcome.HELD for result in results)
    skipped = sum(result.outcome is Outcome.SKIPPED for result in results)
    others = sum(count.values()) - count[Kind.DUPLICATE] - count[Kind.LOSS] - count[Kind.LATE]
    parts = [
        _count(count[Kind.DUPLICATE], "duplicate"),
        _count(count[Kind.LOSS], "loss", "losses"),
        _count(count[Kind.LATE], "late recovery", "late recoveries"),
    ]
    parts += [_count(others, "other fault")] if others else []
    word = "every promise held" if is_clean(results) else "NOT what is promised"
    tail = f"{kept} of {len(results)} faults held" + (f", {skipped} skipped" if skipped else "")
    return f"verdict: {word}: {', '.join(parts)}; {tail}; {took_s:.0f} s"


def record_of(results: Sequence[FaultResult], about: dict[str, Any], *, took_s: float) -> dict[str, Any]:
    """The whole record, ready for JSON; logs and outputs as text."""
    return {
        **about,
        "held": is_clean(results) and bool(about.get("finished", True)),
        "verdict": verdict_line(results, took_s=took_s),
        "tookS": round(took_s, 3),
        "faults": [_plain(asdict(result)) for result in results],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
