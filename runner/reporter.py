"""What attempts have to tell, a start or an end: each at once while few do, and together while many do."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass

import structlog

from runner.errors import Refused, Unreachable
from runner.proof import Proof
from shared.protocol import MAX_REPORTS, Completed, Completion, Start, StartAnswer

log = structlog.get_logger()

MOST_UNDER_WAY = 4
MOST_OUTPUTS_TOGETHER = 10
MOST_LOG_TOGETHER = 8 * 1024 * 1024  # the coordinator reads and forces to its disk the whole log of each
LOOK_S = 1.0
METHOD_NOT_ALLOWED = 405

Said = Start | Completion
Answered = StartAnswer | Completed


@dataclass(eq=False)
class Report:
    """What one attempt tells; `outcome` is the answer, or the error that says why there is none."""

    proof: Proof
    said: Said
    outcome: Answered | Exception | None = None
    is_under_way: bool = False
    goes_alone: bool = False


class Reporter:
    """Any number of threads may tell something; each waits for its own answer, or gets its own error.

    A few requests are under way at once. What has to wait for one of them goes with the next, all together.
    """

    def __init__(
        self,
        send_one: Callable[[Proof, Said], Answered],
        send_all: Callable[[Sequence[Report]], Sequence[Answered | Exception]],
    ) -> None:
        self._send_one = send_one
        self._send_all = send_all
        self._turn = threading.Condition()
        self._waiting: deque[Report] = deque()
        self._under_way = 0
        self._takes_several = True  # until a coordinator of an older version says otherwise

    def tell(self, proof: Proof, said: Said) -> Answered:
        """The coordinator's answer. Raises what the report's own request would have raised."""
        report = Report(proof, said, goes_alone=not self._takes_several or _takes_long(said))
        if not report.goes_alone:
            with self._turn:
                self._waiting.append(report)
        while report.outcome is None and not report.goes_alone:
            if group := self._wait_for_turn(report):
                self._send(group)
        if report.goes_alone:
            return self._send_one(proof, said)
        if isinstance(report.outcome, Exception):
            raise report.outcome
        assert report.outcome is not None  # noqa: S101 - as the loop above has ended
        return report.outcome

    def _wait_for_turn(self, report: Report) -> list[Report]:
        """What this thread is to send now; nothing when another one has sent its report, or is at it."""
        with self._turn:
            if report.outcome is not None or report.goes_alone:
                return []
            if report.is_under_way or self._under_way >= MOST_UNDER_WAY:
                self._turn.wait(LOOK_S)
                return []
            group = [self._waiting.popleft() for _ in range(min(MAX_REPORTS, len(self._waiting)))]
            for one in group:
                one.is_under_way = True
            self._under_way += 1
            return group

    def _send(self, group: Sequence[Report]) -> None:
        """Send them, and let everybody have what came of it; where nothing did, each goes alone."""
        outcomes: Sequence[Answered | Exception] = ()
        try:
            outcomes = self._sent_by_itself(group[0]) if len(group) == 1 else self._sent_together(group)
        finally:
            with self._turn:
                self._under_way -= 1
                for place, report in enumerate(group):
                    report.outcome = outcomes[place] if place < len(outcomes) else None
                    report.goes_alone = report.outcome is None
                self._turn.notify_all()

    def _sent_by_itself(self, report: Report) -> list[Answered | Exception]:
        try:
            return [self._send_one(report.proof, report.said)]
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the report is told
            return [error]

    def _sent_together(self, group: Sequence[Report]) -> Sequence[Answered | Exception]:
        """Nothing when they were refused as a whole, which says nothing of any of them."""
        try:
            return self._send_all(group)
        except Unreachable as error:
            return [copy(error) for _ in group]
        except Exception as error:  # noqa: BLE001 - each of them is told by itself, and hears why
            if isinstance(error, Refused) and error.status == METHOD_NOT_ALLOWED:
                self._takes_several = False
            log.warning("reports_not_taken_together", count=len(group), cause=str(error))
            return []


def _takes_long(said: Said) -> bool:
    """Others should not wait for so much."""
    if isinstance(said, Start):
        return False
    return len(said.artifacts) > MOST_OUTPUTS_TOGETHER or (said.log_size or 0) > MOST_LOG_TOGETHER
