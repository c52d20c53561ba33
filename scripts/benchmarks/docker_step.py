"""What a step in a container costs more, or less, than the same container by hand.

Ours is the time from the moment the runner holds the claim to the moment the completion is acknowledged, as
the runner's own log tells it; nothing is subtracted. The steps of a build stand in a chain and the runner has
one slot, so each begins right after the one before. Containers are on a bridge network of their own.
The rival is the wall clock of `docker run --rm --network none` of the same image with `true`.
"""

import json
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.benchmarks.builds import IMAGE, BuildServer, a_step
from scripts.benchmarks.figure import Figure, Goal, in_turns, say
from scripts.benchmarks.servers import a_coordinator, a_runner, temporary_folder

BUILD_S = 120.0
BARE = Goal(0.7, "<= 0.7 of docker run")
FULL = Goal(1.0, "<= 1.0 of docker run")


@dataclass(frozen=True)
class Size:
    """How many steps and how many `docker run` a round has, and how many rounds."""

    steps: int = 10
    rounds: int = 5


QUICK = Size(steps=4, rounds=3)
SMALLEST = Size(steps=1, rounds=1)


def measure(size: Size) -> list[Figure]:
    with temporary_folder() as folder, a_coordinator(folder / "data") as coordinator:
        api = BuildServer(coordinator)
        repository = make_repository(folder / "repository")
        with a_runner(coordinator, folder / "state", folder / "runner.log"):
            said = folder / "runner.log"
            bare = api.a_workflow(_chain(size.steps))
            full = api.a_workflow(
                _chain(size.steps, run="date > made", cacheDirs=["cache"], outputPaths=["made"])
            )
            say("docker: warming up")
            api.finish(api.a_build(full, repository), within_s=BUILD_S)
            bare_s, full_s, rival_s = in_turns(
                "docker, seconds a step",
                size.rounds,
                lambda: _seconds_a_step(api, api.a_build(bare), said),
                lambda: _seconds_a_step(api, api.a_build(full, repository), said),
                lambda: _seconds_of_docker_run(size.steps),
            )
        api.close()
    rival = f"docker run {rival_s * 1000:.0f} ms"
    return [
        Figure(
            name,
            f"{seconds * 1000:.0f} ms",
            f"{rival} ({seconds / rival_s:.2f})",
            goal.text,
            goal.is_met_by(seconds / rival_s),
        )
        for name, seconds, goal in (
            ("a step that does nothing in a container", bare_s, BARE),
            ("a step with checkout, cache and output", full_s, FULL),
        )
    ]


def make_repository(folder: Path) -> Path:
    """A git repository with one commit on `main`, readable by every user."""
    folder.mkdir()
    (folder / "hello.txt").write_text("hello\n")
    who = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
    for words in (["init", "-q", "-b", "main"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", "-C", folder, *words], check=True, timeout=60)
    subprocess.run(["chmod", "-R", "a+rX", folder], check=True, timeout=60)
    return folder


def read_said(said: Path) -> list[dict[str, Any]]:
    """What the runner has logged so far; lines that are not ours are left out."""
    lines = said.read_text(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def when(said: Path, event: str, step_ids: set[str]) -> dict[str, float]:
    """When the runner logged this event for each of the steps; it writes right after it is answered."""
    deadline = time.monotonic() + 10
    while True:
        found = {
            line["step"]: line["uptime"]
            for line in read_said(said)
            if line["event"] == event and line["step"] in step_ids
        }
        if found.keys() == step_ids:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError(f"the runner did not say {event} of {len(step_ids - found.keys())} steps")
        time.sleep(0.01)


def _chain(count: int, **more: Any) -> list[dict[str, Any]]:
    return [a_step(f"s{n}", after=[f"s{n - 1}"] if n else [], **more) for n in range(count)]


def _seconds_a_step(api: BuildServer, build_id: str, said: Path) -> float:
    build = api.finish(build_id, within_s=BUILD_S)
    ids = {step["id"] for step in build["steps"]}
    acquired, completed = when(said, "step_acquired", ids), when(said, "step_completed", ids)
    return statistics.median(completed[step] - acquired[step] for step in ids)


def _seconds_of_docker_run(count: int) -> float:
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        subprocess.run(["docker", "run", "--rm", "--network", "none", IMAGE, "true"], check=True, timeout=60)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
