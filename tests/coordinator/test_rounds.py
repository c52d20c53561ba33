"""Whatever happens to a build in whatever order, its rounds stay right."""

from collections.abc import Mapping
from typing import Any

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.retry_build import StepsToRetry, retry_build
from coordinator.actions.show_build import show_all_rounds
from coordinator.errors import Conflict
from coordinator.store import rounds, steps
from coordinator.store.dialect import Database
from shared.readiness import build_outcome
from shared.states import FINAL_STEP_STATES, StepState
from tests.factories import LOCAL, Held, MadeBuild, MadeRunner, Mill, a_spec

FINAL = {str(state) for state in FINAL_STEP_STATES}
EVENTS = {
    "claim": 5,
    "succeed": 6,
    "fail": 3,
    "retry failed": 3,
    "retry all": 4,
    "break": 1,
    "silence": 1,
    "cancel": 1,
}
WEIGHED = [event for event, weight in EVENTS.items() for _ in range(weight)]


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, list[str]]:
    """Up to seven steps; each depends on any of those before it."""
    names = [f"s{number}" for number in range(draw(st.integers(1, 7)))]
    return {
        name: draw(st.lists(st.sampled_from(names[:at]), unique=True, max_size=2)) if at else []
        for at, name in enumerate(names)
    }


class Story:
    """One build, what was seen of it so far, and what has to hold after each event."""

    def __init__(self, mill: Mill, runner: MadeRunner, graph: Mapping[str, list[str]]) -> None:
        self.mill = mill
        self.runner = runner
        self.graph = graph
        self.build: MadeBuild = mill.a_build(a_spec(**graph))
        self.held: list[Held] = []
        self.ended: dict[str, tuple[Any, ...]] = {}
        self.marks: dict[str, str] = {}

    def tell(self, event: str, which: int) -> None:
        held = self.held[which % len(self.held)] if self.held else None
        if event == "claim":
            self._claim()
        elif event == "cancel":
            self._try(cancel_build, self.mill.site, LOCAL, self.build.id)
        elif event.startswith("retry"):
            self._try(retry_build, LOCAL, self.build.id, StepsToRetry(event.split()[1]))
        elif event == "silence":
            self._fall_silent()
        elif held is not None:
            self._end(held, event)
        self.check()

    def finish(self) -> None:
        """Whatever is left runs to its end, so that nothing is left for the next build."""
        for _ in range(200):
            for held in list(self.held):
                self._end(held, "succeed")
            self._pass_time(30)
            self._claim(slots=10)
            if not self.held:
                break
        self.check()
        assert self.mill.build(self.build.id).finished_at is not None

    def _try(self, action: Any, *args: Any) -> None:
        try:
            self.mill.now(action, *args)
        except Conflict:
            pass  # refused, and nothing may have changed: the check says so

    def _claim(self, slots: int = 1) -> None:
        for held in self.mill.acquire(self.runner, slots=slots):
            self._check_inputs(held)
            self.mill.start(held)
            self.held.append(held)

    def _end(self, held: Held, how: str) -> None:
        self.held.remove(held)
        step = self.mill.step(held.step_id)
        is_current = (step.state, step.attempt) == (StepState.RUNNING, held.claim.attempt)
        if how == "succeed":
            self.marks[held.step_id] = f"{held.claim.name}-{len(self.marks)}"
            output = {"path": held.claim.name, "type": "link", "target": self.marks[held.step_id]}
            self._say(held, is_current, "success", artifacts=[output])
        elif how == "fail":
            self._say(held, is_current, "failed", exit_code=1)
        else:
            self._say(held, is_current, "failed", reason="daemon_error")

    def _say(self, held: Held, is_current: bool, status: str, **said: Any) -> None:
        try:
            self.mill.complete(held, status, **said)
        except Conflict:
            assert not is_current  # somebody else has it, or it was given up

    def _pass_time(self, seconds: float) -> None:
        self.mill.clock.advance(seconds)
        if self.held:
            self.mill.heartbeat(self.runner, *self.held)
        self.mill.expire()

    def _fall_silent(self) -> None:
        self.mill.clock.advance(400)
        for _ in range(3):
            self.mill.expire()

    def _rows(self) -> list[Any]:
        return self.mill.tx(show_all_rounds, LOCAL, self.build.id).steps

    def _latest(self) -> dict[str, Any]:
        latest: dict[str, Any] = {}
        for row in sorted(self._rows(), key=lambda row: row.round):
            latest[row.name] = row
        return latest

    def check(self) -> None:
        rows, latest, build = self._rows(), self._latest(), self.mill.build(self.build.id)
        self._check_rows(rows, latest, build)
        self._check_arrows(latest)
        self._check_build(latest, build)

    def _check_rows(self, rows: list[Any], latest: dict[str, Any], build: Any) -> None:
        found = {row.id: tuple(row) for row in rows if row.state in FINAL}
        assert found | self.ended == found, "a row changed after it had ended"
        self.ended = found
        assert len({(row.name, row.round) for row in rows}) == len(rows)
        assert {row.name for row in rows} == set(self.graph)
        for row in rows:
            assert row.round <= build.round
            assert row.state in FINAL or (row.round == build.round and latest[row.name].id == row.id)
        shown = {row.name: row.id for row in self.mill.tx(steps.list_steps, self.build.id)}
        assert shown == {name: row.id for name, row in latest.items()}

    def _check_arrows(self, latest: dict[str, Any]) -> None:
        arrows = self.mill.tx(rounds.list_latest_dependencies, self.build.id)
        for name, row in latest.items():
            assert set(arrows.get(row.id, [])) == {latest[other].id for other in self.graph[name]}
            if row.state == StepState.READY or row.state == StepState.SUCCEEDED:
                assert {latest[other].state for other in self.graph[name]} <= {StepState.SUCCEEDED}

    def _check_build(self, latest: dict[str, Any], build: Any) -> None:
        counts: dict[StepState, int] = {}
        for row in latest.values():
            counts[StepState(row.state)] = counts.get(StepState(row.state), 0) + 1
        is_cancelled = build.cancel_requested_at is not None
        outcome = build_outcome(counts, is_cancelled=is_cancelled)
        if outcome is not None:
            assert (build.state, build.finished_at is None) == (outcome, False)
        else:
            has_begun = any(row.attempt for row in latest.values() if row.round == build.round)
            expected = "cancelling" if is_cancelled else "running" if has_begun else "queued"
            assert (build.state, build.finished_at, build.reason) == (expected, None, None)

    def _check_inputs(self, held: Held) -> None:
        latest = self._latest()
        behind, waiting = set(), list(self.graph[held.claim.name])
        while waiting:
            name = waiting.pop()
            if name not in behind:
                behind.add(name)
                waiting += self.graph[name]
        assert latest[held.claim.name].id == held.step_id
        assert {found.target for found in held.claim.inputs} == {
            self.marks[latest[name].id] for name in behind
        }


def test_whatever_happens_the_rounds_of_a_build_stay_right(mill: Mill, database: Database) -> None:
    runner = mill.a_runner()

    @settings(
        max_examples=30 if database.is_sqlite else 10,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],  # to shorten a story takes minutes
    )
    @given(
        graph=graphs(),
        events=st.lists(st.tuples(st.sampled_from(WEIGHED), st.integers(0, 20)), min_size=10, max_size=40),
    )
    def stay_right(graph: dict[str, list[str]], events: list[tuple[str, int]]) -> None:
        mill.clock.advance(100)  # the time after a start in which nobody counts as lost is over
        story = Story(mill, runner, graph)
        for event, which in events:
            story.tell(event, which)
        story.finish()

    stay_right()

    finished = [row.details["stepId"] for row in mill.audited("step.finished")]
    assert finished
    assert len(finished) == len(set(finished))
