"""What a fault of the drill found: figures against promises, and whatever should not have been."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from coordinator.cli.drill.history import History


class Kind(StrEnum):
    """What a finding is about."""

    DUPLICATE = "duplicate"
    LOSS = "loss"
    ORDER = "order"
    LATE = "late"
    LEFTOVER = "leftover"
    WRONG = "wrong"


@dataclass(frozen=True)
class Finding:
    """Something that must not be."""

    kind: Kind
    what: str


@dataclass(frozen=True)
class Figure:
    """A time that was measured, and the one that is promised."""

    name: str
    measured_s: float
    promised_s: float

    @property
    def held(self) -> bool:
        return self.measured_s <= self.promised_s


@dataclass(frozen=True)
class Seen:
    """What one fault brought to light."""

    figures: tuple[Figure, ...] = ()
    findings: tuple[Finding, ...] = ()
    builds: tuple[History, ...] = ()
    note: str = ""


class Outcome(StrEnum):
    """How a fault went."""

    HELD = "held"
    BROKEN = "broken"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class FaultResult:
    """One fault, told the same way whatever it was."""

    fault: str
    outcome: Outcome
    seen: Seen
    took_s: float


def late_figures(figures: Iterable[Figure]) -> list[Finding]:
    """A finding for each figure that is above its promise."""
    return [
        Finding(
            Kind.LATE,
            f"{figure.name}: {figure.measured_s:.1f} s, where {figure.promised_s:.0f} s are promised",
        )
        for figure in figures
        if not figure.held
    ]


def judge(fault: str, seen: Seen, *, took_s: float) -> FaultResult:
    """Held, when nothing was found and no figure is late."""
    findings = (*seen.findings, *late_figures(seen.figures))
    outcome = Outcome.BROKEN if findings else Outcome.HELD
    return FaultResult(fault, outcome, Seen(seen.figures, findings, seen.builds, seen.note), took_s)


def is_clean(results: Iterable[FaultResult]) -> bool:
    """True when at least one fault was tried and none of them broke a promise."""
    outcomes = [result.outcome for result in results]
    return Outcome.HELD in outcomes and Outcome.BROKEN not in outcomes
