"""What this process has counted since its start; only metrics read it."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counted in the event loop alone, so that no lock is needed."""

    claims: int = 0
    completions: Counter[str] = field(default_factory=Counter)
