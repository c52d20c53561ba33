"""What attempts have to tell, a start or an end: each at once while few do, and together while many do."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from runner.errors import Refused, RunnerError, Unreachable
from runner.proof import Proof
from shared.protocol import MAX_REPORTS, Completed, Completion, Start, StartAnswer

log = structlog.get_logger()

MOST_UNDER_WAY = 4
MOST_OUTPUTS_TOGETHER = 50
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
        self._most_together = MAX_REPORTS

    def tell(self, proof: Proof, said: Said) -> Answered:
        """The coordinator's answer. Raises what the report's own request would have raised."""
        if isinstance(said, Completion) and len(said.artifacts) > MOST_OUTPUTS_TOGETHER:
            return self._send_one(proof, said)  # others should not wait for so much
        report = Report(proof, said)
        with self._turn:
            self._waiting.append(report)
        while report.outcome is None:
            if group := self._wait_for_turn(report):
                self._send(group)
        if isinstance(report.outcome, Exception):
            raise report.outcome
        return report.outcome

    def _wait_for_turn(self, report: Report) -> list[Report]:
        """What this thread is to send now; nothing when another one has sent its report, or is at it."""
        with self._turn:
            if report.outcome is not None:
                return []
            if report.is_under_way or self._under_way >= MOST_UNDER_WAY:
                self._turn.wait(LOOK_S)
                return []
            group = [self._waiting.popleft() for _ in range(min(self._most_together, len(self._waiting)))]
            for one in group:
                one.is_under_way = True
            self._under_way += 1
            return group

    def _send(self, group: Sequence[Report]) -> None:
        """Send them, and let everybody have what came of it."""
        outcomes: Sequence[Answered | Exception] = ()
        try:
            outcomes = self._sent_alone(group) if len(group) == 1 else self._sent_together(group)
        finally:
            with self._turn:
                self._under_way -= 1
                for place, report in enumerate(group):
                    lost = Unreachable("the thread that sent this report has ended")
                    report.outcome = outcomes[place] if place < len(outcomes) else lost
                self._turn.notify_all()

    def _sent_alone(self, group: Sequence[Report]) -> list[Answered | Exception]:
        outcomes: list[Answered | Exception] = []
        for report in group:
            try:
                outcomes.append(self._send_one(report.proof, report.said))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the report is told
                outcomes.append(error)
        return outcomes

    def _sent_together(self, group: Sequence[Report]) -> Sequence[Answered | Exception]:
        try:
            return self._send_all(group)
        except Unreachable as error:
            return [error] * len(group)
        except RunnerError as error:
            # refused as a whole it says nothing of any of them: each has to be told by itself
            if isinstance(error, Refused) and error.status == METHOD_NOT_ALLOWED:
                self._most_together = 1  # a coordinator of an older version
            log.warning("reports_not_taken_together", count=len(group), cause=str(error))
            return self._sent_alone(group)
