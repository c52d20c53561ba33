"""How fast a large log gets from a container to where it stays.

Ours is the time from the script's first byte to the acknowledged completion, for which the coordinator has
sealed the log: every byte there, its digest compared and forced to the disk. The rival is `docker run` of the
same script with its output in a file, from the script's first byte to the end of the command; it seals
nothing. The script says when it begins in its first line, by the clock that runner and container share.
"""

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmarks.builds import IMAGE, BuildServer, a_step
from scripts.benchmarks.docker_step import when
from scripts.benchmarks.figure import Figure, Goal, in_turns
from scripts.benchmarks.servers import a_coordinator, a_runner, temporary_folder
from scripts.benchmarks.timed_runner import uptime_s

MB = 1_000_000
LINE = "a line of a log that is about as long as those which compilers and tests like to write"
BUILD_S = 180.0
GOAL = Goal(50.0, ">= 50 MB/s", at_least=True)
_BEGAN = re.compile(r"^([0-9]+\.[0-9]+) [0-9.]+$", re.MULTILINE)


@dataclass(frozen=True)
class Size:
    megabytes: int = 60
    rounds: int = 5


QUICK = Size(rounds=3)
SMALLEST = Size(megabytes=1, rounds=1)


def measure(size: Size) -> list[Figure]:
    script = f"cat /proc/uptime; yes '{LINE}' | head -c {size.megabytes * MB}"
    with temporary_folder() as folder, a_coordinator(folder / "data") as coordinator:
        api = BuildServer(coordinator)
        said = folder / "runner.log"
        with a_runner(coordinator, folder / "state", said):
            workflow = api.a_workflow([a_step("talk", run=f"{{ {script}; }} || true")])
            ours, rival = in_turns(
                "log, MB/s",
                size.rounds,
                lambda: size.megabytes / _seconds_of_ours(api, workflow, said),
                lambda: size.megabytes / _seconds_of_docker_run(script, folder / "output"),
            )
        api.close()
    return [
        Figure(
            f"a log of {size.megabytes} MB from container to coordinator",
            f"{ours:.0f} MB/s",
            f"docker run > file {rival:.0f} MB/s ({ours / rival:.2f})",
            GOAL.text,
            GOAL.is_met_by(ours),
        )
    ]


def _seconds_of_ours(api: BuildServer, workflow: str, said: Path) -> float:
    build = api.finish(api.a_build(workflow), within_s=BUILD_S)
    step_id = build["steps"][0]["id"]
    completed = when(said, "step_completed", {step_id})[step_id]
    return completed - _began(api.first_of_log(step_id, 4096))


def _seconds_of_docker_run(script: str, output: Path) -> float:
    with output.open("wb") as file:
        subprocess.run(
            ["docker", "run", "--rm", "--network", "none", IMAGE, "sh", "-c", script],
            check=True,
            timeout=BUILD_S,
            stdout=file,
        )
    ended = uptime_s()
    with output.open("rb") as file:
        return ended - _began(file.read(4096).decode(errors="replace"))


def _began(log: str) -> float:
    found = _BEGAN.search(log)
    if found is None:
        raise RuntimeError(f"the log does not say when it began: {log[:500]!r}")
    return float(found[1])
