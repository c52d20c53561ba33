"""Runs measurements by name and prints their table; scripts/bench says how."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

from scripts.benchmarks import cache_speed, docker_step, followers, log_speed, start, steps
from scripts.benchmarks.figure import Figure, say
from scripts.benchmarks.page import describe_machine, table_of, write_table


@dataclass(frozen=True)
class Measurement:
    """One name on the command line, in its two sizes."""

    whole: Callable[[], list[Figure]]
    quick: Callable[[], list[Figure]]


MEASUREMENTS = {
    "steps": Measurement(lambda: steps.measure(steps.Size()), lambda: steps.measure(steps.QUICK)),
    "start": Measurement(lambda: start.measure(start.Size()), lambda: start.measure(start.QUICK)),
    "docker": Measurement(
        lambda: docker_step.measure(docker_step.Size()), lambda: docker_step.measure(docker_step.QUICK)
    ),
    "log": Measurement(
        lambda: log_speed.measure(log_speed.Size()), lambda: log_speed.measure(log_speed.QUICK)
    ),
    "followers": Measurement(
        lambda: followers.measure(followers.Size()), lambda: followers.measure(followers.QUICK)
    ),
    "cache": Measurement(
        lambda: cache_speed.measure(cache_speed.Size()), lambda: cache_speed.measure(cache_speed.QUICK)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=", ".join(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="fewer rounds, at most two minutes")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    told = parser.parse_args()
    unknown = sorted(set(told.names) - MEASUREMENTS.keys())
    if unknown:
        parser.error(f"there is no measurement {unknown[0]!r}, only {', '.join(MEASUREMENTS)}")
    began = time.monotonic()
    figures: list[Figure] = []
    for name in told.names or MEASUREMENTS:
        say(f"{name}: begins")
        figures += MEASUREMENTS[name].quick() if told.quick else MEASUREMENTS[name].whole()
    print(f"{describe_machine()}\n\n{table_of(figures)}", flush=True)
    if told.write:
        words = [*told.names, *(["--quick"] if told.quick else [])]
        write_table(figures, " ".join(["scripts/bench", *words]), time.monotonic() - began)


if __name__ == "__main__":
    main()
