"""How soon a waiting runner may start a step of a build that is only being created.

From the moment before the request that creates the build is sent, to the answer to the runner's `start`:
the runner waits in a long poll, takes the step, says that it is about to start it and is told to go.
"""

import json
import queue
import threading
import time
from dataclasses import dataclass

from scripts.benchmarks.builds import BuildServer, a_step
from scripts.benchmarks.figure import Figure, Goal, percentile, say
from scripts.benchmarks.line import BadAnswer, Line
from scripts.benchmarks.noop_runner import NoopRunner
from scripts.benchmarks.servers import a_coordinator, temporary_folder

WAIT_S = 25
SETTLE_S = 0.01
LONGEST_S = 30.0
P50 = Goal(0.020, "p50 <= 20 ms")
P99 = Goal(0.100, "p99 <= 100 ms")


@dataclass(frozen=True)
class Size:
    builds: int = 500


QUICK = Size(builds=150)
SMALLEST = Size(builds=2)


def measure(size: Size) -> list[Figure]:
    with temporary_folder() as folder, a_coordinator(folder / "data") as coordinator:
        api = BuildServer(coordinator)
        workflow = api.a_workflow([a_step("only")])
        runner = NoopRunner(coordinator.host, coordinator.port, api.a_runner_secret())
        going: queue.Queue[float] = queue.Queue()
        serving = threading.Thread(target=_serve, args=(runner, size.builds, going), daemon=True)
        serving.start()
        line = Line(coordinator.host, coordinator.port)
        path, body = api.build_request(workflow)
        seconds = []
        for number in range(size.builds):
            time.sleep(SETTLE_S)  # the runner is back in its long poll by then
            began = time.perf_counter()
            if line.post(path, json.dumps(body).encode()).status != 201:
                raise BadAnswer("the build was not created")
            seconds.append(going.get(timeout=LONGEST_S) - began)
            if number % 100 == 99:
                say(f"start: {number + 1} builds: median {percentile(seconds, 0.5) * 1000:.1f} ms")
        serving.join(LONGEST_S)
        runner.close()
        line.close()
        api.close()
    middle, late = percentile(seconds, 0.5), percentile(seconds, 0.99)
    name = "build created to `start` answered, SQLite"
    return [
        Figure(name, f"p50 {middle * 1000:.1f} ms", "", P50.text, P50.is_met_by(middle)),
        Figure(name, f"p99 {late * 1000:.1f} ms", "", P99.text, P99.is_met_by(late)),
    ]


def _serve(runner: NoopRunner, count: int, going: "queue.Queue[float]") -> None:
    """Take and start one step after the other, and tell when each was let go."""
    for _ in range(count):
        claims = runner.acquire(slots=1, wait=WAIT_S)
        if not claims:
            return
        runner.start(claims[0])
        going.put(time.perf_counter())
        runner.complete(claims[0])
