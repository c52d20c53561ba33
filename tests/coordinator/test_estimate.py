"""When a build will end: what is counted, what is not known, and how far off it is."""

import heapq
import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from coordinator.rules.estimate import LEAST_SHARE, StepTimes, estimate_left, usual_times
from shared.states import StepState
from tests.fakes import MORNING

PAGE = Path(__file__).parents[2] / "docs" / "estimates.md"
Graph = Mapping[str, Sequence[str]]


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def at(number: float) -> datetime:
    return MORNING + seconds(number)


def took(ran: float, *, waited: float = 0, prepared: float = 0) -> StepTimes:
    return StepTimes(seconds(waited), seconds(prepared), seconds(ran))


def a_row(name: str, state: StepState = StepState.PENDING, **fields: Any) -> Any:
    """A step of a build as the store hands it out; its moments are seconds of the morning."""
    moments = dict.fromkeys(("ready_at", "not_before", "claimed_at", "started_at"))
    known = {"id": name, "name": name, "round": 1, "rank": 0, "state": state, **moments, **fields}
    return SimpleNamespace(
        **{key: at(value) if key in moments and value is not None else value for key, value in known.items()}
    )


def left(
    *rows: Any, history: Mapping[str, Sequence[StepTimes]], arrows: Graph | None = None, now: float = 0
) -> float | None:
    found = estimate_left(rows, arrows or {}, history, now=at(now))
    return None if found is None else found.total_seconds()


def test_steps_behind_each_other_add_up_and_steps_beside_each_other_do_not() -> None:
    history = {"top": [took(10)], "left": [took(20)], "right": [took(50)], "bottom": [took(5)]}
    arrows = {"left": ["top"], "right": ["top"], "bottom": ["left", "right"]}

    rows = [a_row(name, rank=rank) for rank, name in enumerate(history)]

    assert left(*rows, history=history, arrows=arrows) == 10 + 50 + 5


def test_the_way_is_found_in_whatever_order_the_steps_are_listed() -> None:
    history = {"first": [took(10)], "second": [took(20)], "third": [took(40)]}
    arrows = {"second": ["first"], "third": ["second"]}
    rows = [a_row("third", rank=2), a_row("first", rank=0), a_row("second", rank=1)]

    assert left(*rows, history=history, arrows=arrows) == 70


def test_one_run_that_took_for_ever_moves_the_usual_time_little() -> None:
    runs = [took(10), took(11), took(9), took(10), took(10_000)]

    assert usual_times(runs) == took(10)


def test_each_part_of_a_step_has_a_middle_of_its_own() -> None:
    runs = [
        took(10, waited=100, prepared=1),
        took(30, waited=0, prepared=500),
        took(20, waited=4, prepared=2),
    ]

    assert usual_times(runs) == took(20, waited=4, prepared=2)


def test_what_a_running_step_has_used_is_subtracted() -> None:
    row = a_row("test", StepState.RUNNING, ready_at=0, claimed_at=5, started_at=10)

    assert left(row, history={"test": [took(60, waited=5, prepared=5)]}, now=30) == 40


def test_a_step_that_takes_longer_than_usual_has_a_small_share_left() -> None:
    row = a_row("test", StepState.RUNNING, started_at=0)

    assert left(row, history={"test": [took(60)]}, now=3600) == 60 * LEAST_SHARE


def test_a_claimed_step_still_has_its_whole_run_before_it() -> None:
    row = a_row("test", StepState.CLAIMED, ready_at=0, claimed_at=10)

    assert left(row, history={"test": [took(60, waited=10, prepared=8)]}, now=15) == 3 + 60


def test_a_step_that_waits_for_a_runner_has_the_rest_of_its_usual_wait_before_it() -> None:
    row = a_row("test", StepState.READY, ready_at=0)
    history = {"test": [took(60, waited=20, prepared=5)]}

    assert left(row, history=history, now=15) == 5 + 5 + 60
    assert left(row, history=history, now=900) == 20 * LEAST_SHARE + 5 + 60


def test_a_step_between_two_attempts_waits_out_the_pause_first() -> None:
    row = a_row("test", StepState.READY, ready_at=0, not_before=100)

    assert left(row, history={"test": [took(60, waited=20, prepared=5)]}, now=90) == 10 + 20 + 5 + 60


def test_a_clock_that_was_set_back_makes_no_step_longer() -> None:
    row = a_row("test", StepState.RUNNING, started_at=500)

    assert left(row, history={"test": [took(60)]}, now=0) == 60


@pytest.mark.parametrize("state", [state for state in StepState if state.is_final])
def test_what_has_ended_takes_no_time_and_needs_no_history(state: StepState) -> None:
    ended = a_row("lint", state, rank=0)
    waiting = a_row("test", StepState.RUNNING, rank=1, started_at=0)

    assert left(ended, waiting, history={"test": [took(60)]}, arrows={"test": ["lint"]}) == 60


def test_one_step_without_a_history_leaves_the_whole_unknown() -> None:
    known = a_row("test", StepState.RUNNING, started_at=0)

    assert left(known, a_row("renamed", rank=1), history={"test": [took(60)]}) is None
    assert left(known, a_row("new", rank=1), history={"test": [took(60)], "new": []}) is None


def test_nothing_is_left_when_every_step_has_ended() -> None:
    assert left(a_row("test", StepState.SUCCEEDED), history={}) == 0


def test_only_the_latest_row_of_each_step_counts() -> None:
    failed = a_row("test", StepState.FAILED, id="old")
    again = a_row("test", StepState.RUNNING, id="new", round=2, started_at=0)
    replaced = a_row("lint", StepState.RUNNING, id="older", started_at=0)
    done = a_row("lint", StepState.SUCCEEDED, id="newer", round=2)

    assert left(again, failed, replaced, done, history={"test": [took(60)], "lint": [took(900)]}) == 60


# --- how far off it is

HISTORIES = 150
BUILDS = 10
NOISE = 0.2
OUTLIERS = 0.05
PROGRESS = (0.0, 0.25, 0.5, 0.75, 0.9)
BOUND = 0.25


@dataclass(frozen=True)
class Went:
    """How one step of a synthetic build went, in seconds since the build was made."""

    ready: float
    claimed: float
    started: float
    finished: float

    @property
    def times(self) -> StepTimes:
        return took(
            self.finished - self.started,
            waited=self.claimed - self.ready,
            prepared=self.started - self.claimed,
        )

    def row(self, name: str, rank: int, now: float) -> Any:
        states = {
            self.ready: StepState.READY,
            self.claimed: StepState.CLAIMED,
            self.started: StepState.RUNNING,
            self.finished: StepState.SUCCEEDED,
        }
        reached = [state for moment, state in states.items() if moment <= now]
        return a_row(
            name,
            reached[-1] if reached else StepState.PENDING,
            rank=rank,
            ready_at=self.ready,
            claimed_at=self.claimed,
            started_at=self.started,
        )


def a_chain(_: random.Random) -> Graph:
    return {f"s{turn}": [f"s{turn - 1}"] if turn else [] for turn in range(6)}


def a_fan(_: random.Random) -> Graph:
    middle = [f"m{turn}" for turn in range(8)]
    return {"top": [], **{name: ["top"] for name in middle}, "bottom": middle}


def a_mesh(chance: random.Random) -> Graph:
    """Four layers of four steps, each step behind two of the layer before."""
    graph: dict[str, list[str]] = {}
    before: list[str] = []
    for layer in range(4):
        names = [f"l{layer}s{turn}" for turn in range(4)]
        graph |= {name: chance.sample(before, 2) if before else [] for name in names}
        before = names
    return graph


SHAPES: dict[str, tuple[Callable[[random.Random], Graph], int]] = {
    "six steps in a chain": (a_chain, 4),
    "eight beside each other, 8 slots": (a_fan, 8),
    "eight beside each other, 2 slots": (a_fan, 2),
    "four layers of four, 16 slots": (a_mesh, 16),
    "four layers of four, 2 slots": (a_mesh, 2),
}


def a_run(chance: random.Random, graph: Graph, usual: Mapping[str, float], slots: int) -> dict[str, Went]:
    """One synthetic build: whatever is ready is taken oldest first, while slots are free."""
    names = list(graph)
    missing = {name: len(behind) for name, behind in graph.items()}
    ready = [(0.0, turn) for turn, name in enumerate(names) if not missing[name]]
    running: list[tuple[float, str]] = []
    went: dict[str, Went] = {}
    now = 0.0
    while ready or running:
        while ready and len(running) < slots:
            since, turn = heapq.heappop(ready)
            name = names[turn]
            started = now + 2 * chance.lognormvariate(0, 0.3)
            factor = chance.uniform(3, 8) if chance.random() < OUTLIERS else 1
            finished = started + usual[name] * chance.lognormvariate(0, NOISE) * factor
            went[name] = Went(since, now, started, finished)
            heapq.heappush(running, (finished, name))
        now, ended = heapq.heappop(running)
        for turn, name in enumerate(names):
            missing[name] -= ended in graph[name]
            if ended in graph[name] and not missing[name]:
                heapq.heappush(ready, (now, turn))
    return went


@cache
def errors_of(shape: str, *, counts_waits: bool = True) -> dict[float, list[float]]:
    """How far off the time left is, as a share of it: at each point of progress, once for each history."""
    chance = random.Random(shape)
    make, slots = SHAPES[shape]
    errors: dict[float, list[float]] = {share: [] for share in PROGRESS}
    for _ in range(HISTORIES):
        graph = make(chance)
        usual = {name: math.exp(chance.uniform(math.log(5), math.log(300))) for name in graph}
        before = [a_run(chance, graph, usual, slots) for _ in range(BUILDS)]
        history = {name: [run[name].times for run in before] for name in graph}
        if not counts_waits:
            history = {
                name: [replace(run, waited=seconds(0)) for run in runs] for name, runs in history.items()
            }
        build = a_run(chance, graph, usual, slots)
        end = max(step.finished for step in build.values())
        for share in PROGRESS:
            rows = [build[name].row(name, rank, share * end) for rank, name in enumerate(graph)]
            guess = left(*rows, arrows=graph, history=history, now=share * end)
            assert guess is not None
            errors[share].append(abs(guess - (1 - share) * end) / ((1 - share) * end))
    return errors


def figures_of(shape: str) -> tuple[float, ...]:
    """The median errors in percent: at each point of progress, and over all of them."""
    errors = errors_of(shape)
    everywhere = [error for found in errors.values() for error in found]
    return tuple(100 * median(found) for found in (*errors.values(), everywhere))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_time_left_is_off_by_a_quarter_at_most_in_the_middle_of_all_cases(shape: str) -> None:
    *_, everywhere = figures_of(shape)

    assert everywhere <= 100 * BOUND


@pytest.mark.parametrize("shape", SHAPES)
def test_before_a_build_has_begun_it_is_off_by_a_fifth_at_most(shape: str) -> None:
    at_the_start, *_ = figures_of(shape)

    assert at_the_start <= 20


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.endswith(" 2 slots")])
def test_where_slots_are_few_counting_the_usual_waits_halves_the_error(shape: str) -> None:
    with_waits, without = errors_of(shape)[0.0], errors_of(shape, counts_waits=False)[0.0]

    assert median(with_waits) < median(without) / 2


@pytest.mark.parametrize("shape", SHAPES)
def test_the_page_shows_the_errors_that_are_measured(shape: str) -> None:
    row = re.search(rf"^\| {re.escape(shape)} \|(.+)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None

    shown = [float(cell.strip().removesuffix("%")) for cell in row.group(1).split("|")]

    assert shown == pytest.approx(figures_of(shape), abs=1)
