"""Each measurement of scripts/bench still runs, in its smallest size; its speed does not matter here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.benchmarks import cache_speed, docker_step, followers, log_speed, start, steps
from scripts.benchmarks.__main__ import MEASUREMENTS
from scripts.benchmarks.figure import Figure, percentile
from scripts.benchmarks.page import BEGIN, END, PAGE, table_of, write_table

SMALLEST: dict[str, Callable[[], list[Figure]]] = {
    "steps on SQLite": lambda: steps.measure_sqlite(steps.SMALLEST),
    "steps on Postgres": lambda: steps.measure_postgres(steps.SMALLEST),
    "start": lambda: start.measure(start.SMALLEST),
    "docker": lambda: docker_step.measure(docker_step.SMALLEST),
    "log": lambda: log_speed.measure(log_speed.SMALLEST),
    "followers": lambda: followers.measure(followers.SMALLEST),
    "cache": lambda: cache_speed.measure(cache_speed.SMALLEST),
}
MARKS = {
    "steps on Postgres": pytest.mark.postgres,
    "docker": pytest.mark.engine,
    "log": pytest.mark.engine,
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in SMALLEST])
def test_a_measurement_runs_to_its_end(name: str) -> None:
    figures = SMALLEST[name]()

    assert figures
    assert all(figure.name and figure.ours and figure.goal for figure in figures)


def test_every_measurement_is_run_in_its_smallest_size_here() -> None:
    assert {name.split()[0] for name in SMALLEST} == set(MEASUREMENTS)


def test_a_percentile_is_one_of_the_numbers() -> None:
    numbers = [float(number) for number in range(1, 101)]

    assert (percentile(numbers, 0.5), percentile(numbers, 0.99)) == (50.0, 99.0)
    assert percentile([7.0], 0.99) == 7.0


def test_writing_the_table_leaves_the_rest_of_the_page_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    figures = [Figure("a name", "1 s", "2 s", "<= 3 s", True), Figure("another", "9 s", "", "<= 3 s", False)]

    write_table(figures, "scripts/bench a", 12.0, page)

    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"\n{END}\nafter\n")
    assert "old" not in text
    assert table_of(figures) in text
    assert text.count("**missed**") == 1


def test_the_page_has_a_place_for_the_table() -> None:
    text = PAGE.read_text()

    assert text.index(BEGIN) < text.index(END)
