"""What can be made again and may go when the disk fills: how the stores of a runner offer it."""

from collections.abc import Callable
from dataclasses import dataclass, field

# What was used this recently may be about to be pinned.
UNTOUCHABLE_S = 600.0


@dataclass(frozen=True)
class Spare:
    """One thing that nobody uses now; `remove` says False when it came into use meanwhile."""

    kind: str
    name: str
    used_at: float
    bytes: int
    remove: Callable[[], bool] = field(repr=False)
