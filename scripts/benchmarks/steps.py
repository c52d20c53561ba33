"""Steps per second through the REST API, from the first claim sent to the last completion acknowledged.

The rival claims and completes as many rows of a bare table one by one in plain SQL, each in a transaction of
its own and as durable: what the same database gives to a program that does nothing else.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psycopg

from coordinator.store.dialect import _sqlite_module
from scripts.benchmarks.builds import BuildServer, a_step
from scripts.benchmarks.figure import Figure, Goal, in_turns, say
from scripts.benchmarks.noop_runner import ALONE, TOGETHER
from scripts.benchmarks.servers import Coordinator, a_coordinator, a_postgres, temporary_folder

STEPS_OF_A_BUILD = 20
PROCESSES = 2
CLIENT_S = 300

SQLITE_GOAL = Goal(1000.0, ">= 1,000/s", at_least=True)
POSTGRES_GOAL = Goal(600.0, ">= 600/s", at_least=True)


@dataclass(frozen=True)
class Size:
    """How many builds a round has, how many rounds, how many runners and how many steps one takes at once."""

    builds: int = 100
    rounds: int = 3
    runners: int = 16
    slots: int = 10


QUICK = Size(builds=20, rounds=3)
SMALLEST = Size(builds=1, rounds=1, runners=2, slots=3)


def measure(size: Size) -> list[Figure]:
    return [*measure_sqlite(size), *measure_postgres(size)]


def measure_sqlite(size: Size) -> list[Figure]:
    with temporary_folder() as folder:
        rival = SqliteRows(folder / "rows.db")
        figures = _measure("SQLite", size, folder, "", rival.run, SQLITE_GOAL)
        rival.close()
        return figures


def measure_postgres(size: Size) -> list[Figure]:
    with temporary_folder() as folder, a_postgres() as url:
        rival = PostgresRows(url)
        figures = _measure("Postgres", size, folder, url, rival.run, POSTGRES_GOAL)
        rival.close()
        return figures


def _measure(
    engine: str, size: Size, folder: Path, database: str, rival: Callable[[int], float], goal: Goal
) -> list[Figure]:
    names = {
        TOGETHER: f"steps/s through the REST API on {engine}",
        ALONE: f"steps/s on {engine}, each start and each end in a request of its own",
    }
    with a_coordinator(folder / "data", database) as coordinator:
        api = BuildServer(coordinator)
        workflow = api.a_workflow([a_step(f"s{n}") for n in range(STEPS_OF_A_BUILD)])
        count = size.builds * STEPS_OF_A_BUILD

        def ours(how: str) -> float:
            made = [api.a_build(workflow) for _ in range(size.builds)]
            secrets = [api.a_runner_secret() for _ in range(size.runners)]
            say(f"{len(made)} builds of {STEPS_OF_A_BUILD} steps are waiting")
            seconds = _drain(coordinator, count, size.slots, secrets, how)
            if api.build(made[-1])["status"] != "SUCCESS":
                raise RuntimeError("the last build has not succeeded")
            return count / seconds

        figures = []
        for how, name in names.items():
            steps_per_s, rows_per_s = in_turns(name, size.rounds, partial(ours, how), partial(rival, count))
            figures.append(_figure(name, steps_per_s, rows_per_s, goal))
        api.close()
        return figures


def _figure(name: str, steps_per_s: float, rows_per_s: float, goal: Goal) -> Figure:
    return Figure(
        name,
        f"{steps_per_s:,.0f}/s",
        f"{rows_per_s:,.0f} rows/s in plain SQL ({steps_per_s / rows_per_s:.2f})",
        goal.text,
        goal.is_met_by(steps_per_s),
    )


def _drain(coordinator: Coordinator, count: int, slots: int, secrets: list[str], how: str) -> float:
    """Let client processes do all steps; the seconds from their first request to their last answer."""
    where = [coordinator.host, str(coordinator.port), str(slots), how]
    with ExitStack() as stack:
        processes = []
        for number in range(PROCESSES):
            command = [sys.executable, "-m", "scripts.benchmarks.noop_runner", *where]
            process = subprocess.Popen(
                [*command, *secrets[number::PROCESSES]],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parents[2],
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError("a client process did not come up")
        told = [json.loads(process.communicate(timeout=CLIENT_S)[0]) for process in _all_told(processes)]
    if sum(one["done"] for one in told) != count:
        raise RuntimeError(f"the clients did {[one['done'] for one in told]} steps of {count}")
    return float(max(one["ended"] for one in told) - min(one["began"] for one in told))


def _all_told(processes: list[subprocess.Popen[str]]) -> list[subprocess.Popen[str]]:
    """Start them at the same moment, before the first of them is waited for."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


class SqliteRows:
    """A bare table of jobs in SQLite, in WAL mode with synchronous=FULL."""

    def __init__(self, path: Path) -> None:
        self._connection = _sqlite_module().connect(str(path), isolation_level=None)
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(
            "CREATE TABLE jobs (id INTEGER PRIMARY KEY, state TEXT NOT NULL, claimed_at REAL, done_at REAL)"
        )
        self._connection.execute("CREATE INDEX jobs_by_state ON jobs (state, id)")

    def close(self) -> None:
        self._connection.close()

    def run(self, count: int) -> float:
        """Rows per second, each claimed and completed."""
        run = self._connection.execute
        run("DELETE FROM jobs")
        with self._connection:
            self._connection.executemany("INSERT INTO jobs (state) VALUES (?)", [("ready",)] * count)
        began = time.perf_counter()
        for _ in range(count):
            run("BEGIN IMMEDIATE")
            (row,) = run(
                "UPDATE jobs SET state = 'claimed', claimed_at = ? WHERE id ="
                " (SELECT id FROM jobs WHERE state = 'ready' ORDER BY id LIMIT 1) RETURNING id",
                (time.time(),),
            ).fetchone()
            run("COMMIT")
            run("BEGIN IMMEDIATE")
            run(
                "UPDATE jobs SET state = 'done', done_at = ? WHERE id = ? AND state = 'claimed'",
                (time.time(), row),
            )
            run("COMMIT")
        return count / (time.perf_counter() - began)


class PostgresRows:
    """The same table in Postgres."""

    def __init__(self, url: str) -> None:
        self._connection = psycopg.connect(url, autocommit=True)
        self._connection.execute(
            "CREATE TABLE plain_jobs"
            " (id BIGSERIAL PRIMARY KEY, state TEXT NOT NULL, claimed_at FLOAT8, done_at FLOAT8)"
        )
        self._connection.execute("CREATE INDEX jobs_by_state ON plain_jobs (state, id)")

    def close(self) -> None:
        self._connection.close()

    def run(self, count: int) -> float:
        """Rows per second, each claimed and completed."""
        run = self._connection.execute
        run("TRUNCATE plain_jobs")
        run("INSERT INTO plain_jobs (state) SELECT 'ready' FROM generate_series(1, %s)", (count,))
        began = time.perf_counter()
        for _ in range(count):
            found = run(
                "UPDATE plain_jobs SET state = 'claimed', claimed_at = %s WHERE id ="
                " (SELECT id FROM plain_jobs WHERE state = 'ready' ORDER BY id LIMIT 1"
                " FOR UPDATE SKIP LOCKED) RETURNING id",
                (time.time(),),
            ).fetchone()
            assert found is not None
            run(
                "UPDATE plain_jobs SET state = 'done', done_at = %s WHERE id = %s AND state = 'claimed'",
                (time.time(), found[0]),
            )
        return count / (time.perf_counter() - began)
