"""How often one runner may ask for steps in vain: a loop gone wild must not keep the others waiting."""

from dataclasses import dataclass

from coordinator.errors import TooMany

BURST = 100.0
PER_SECOND = 10.0
MAX_KNOWN = 10_000


@dataclass
class _Allowance:
    left: float
    at: float


class PollLimit:
    """A runner that gets steps is never slowed down; moments are seconds of a clock that only goes on."""

    def __init__(self) -> None:
        self._known: dict[str, _Allowance] = {}

    def take(self, runner_id: str, *, now: float) -> None:
        """Count one poll, or TooMany."""
        allowance = self._allowance(runner_id, now)
        if allowance.left < 1:
            raise TooMany("this runner asks for steps too often", retry_after_s=1)
        allowance.left -= 1

    def give_back(self, runner_id: str, *, now: float) -> None:
        """The poll was not in vain."""
        allowance = self._allowance(runner_id, now)
        allowance.left = min(BURST, allowance.left + 1)

    def _allowance(self, runner_id: str, now: float) -> _Allowance:
        known = self._known.get(runner_id)
        if known is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            return self._known.setdefault(runner_id, _Allowance(BURST, now))
        known.left = min(BURST, known.left + (now - known.at) * PER_SECOND)
        known.at = now
        return known
