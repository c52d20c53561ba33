"""What a measurement gives back, and how rounds are put together."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_BEGAN = time.monotonic()


@dataclass(frozen=True)
class Figure:
    """One line of the table: what was counted, ours, the rival's or "", and the goal that is met or not."""

    name: str
    ours: str
    rival: str
    goal: str
    is_met: bool


@dataclass(frozen=True)
class Goal:
    """A bound that a number must keep, at most or at least."""

    bound: float
    text: str
    at_least: bool = False

    def is_met_by(self, number: float) -> bool:
        return number >= self.bound if self.at_least else number <= self.bound


def say(line: str) -> None:
    """A line of progress; the table goes to the standard output, this does not."""
    print(f"bench {time.monotonic() - _BEGAN:6.1f} s  {line}", file=sys.stderr, flush=True)


def in_turns(what: str, rounds: int, *sides: Callable[[], float]) -> list[float]:
    """Each side once, then each again: the medians, so that a busy moment of the machine hits all alike."""
    found: list[list[float]] = [[] for _ in sides]
    for number in range(1, rounds + 1):
        for numbers, side in zip(found, sides, strict=True):
            numbers.append(side())
        shown = "  against  ".join(f"{numbers[-1]:.4g}" for numbers in found)
        say(f"{what}: round {number} of {rounds}: {shown}")
    return [statistics.median(numbers) for numbers in found]


def percentile(numbers: Sequence[float], share: float) -> float:
    """The smallest of the numbers that so large a share of them does not exceed."""
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(share * 1000) // 1000) - 1))]
