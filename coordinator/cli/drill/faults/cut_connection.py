"""The network between runner and coordinator breaks while a log flows, and two answers are lost."""

import time
from urllib.parse import urlsplit

import httpx

from coordinator.cli.drill.checker import Wanted
from coordinator.cli.drill.errors import Skipped
from coordinator.cli.drill.proxy import Proxy
from coordinator.cli.drill.result import Figure, Finding, Kind, Seen
from coordinator.cli.drill.stage import Stage
from coordinator.cli.drill.workload import numbered_step

NAME = "cut-connection"
ABOUT = "the network breaks while a log flows, and answers are lost"
LINES = 2000
BURST = 25
CUT_S = 3.0
BACK_S = 10.0


def cause(stage: Stage) -> Seen:
    """The log is the same to the byte, and the step has ended once."""
    proxy, address = _proxied(stage)
    try:
        build = stage.submit([numbered_step(stage.drill, "a", lines=LINES, burst=BURST)])
        runner = stage.a_runner()
        runner.start(address)
        stage.await_lines(build, ["a"], 60)
        lost_log = proxy.swallow_answer("/log")
        stage.until(lost_log.is_set, 20, "waiting for the answer to a piece of log, to lose it")
        proxy.cut()
        time.sleep(CUT_S)
        held = stage.step(build, "a")["logSize"]
        lost_end = proxy.swallow_answer("/complete")
        proxy.mend()
        mended = time.monotonic()
        stage.until(
            lambda: stage.step(build, "a")["logSize"] > held, 6 * BACK_S, "waiting for the log to flow again"
        )
        back_s = time.monotonic() - mended
        stage.await_end(build, 60)
        stage.until(lost_end.is_set, 10, "waiting for the answer to the completion to be lost")
        findings = stage.end_runner(runner)
    finally:
        proxy.close()
    history, wrong = stage.look_back(build, {"a": Wanted(LINES)})
    if runner.is_alive:
        findings.append(Finding(Kind.WRONG, "the runner did not end after its completion was answered"))
    note = f"cut for {CUT_S:g} s, 2 answers lost, {len(history.steps[0].attempts[-1].log)} bytes of log"
    return Seen((Figure("log flows again", back_s, BACK_S),), (*findings, *wrong), (history,), note)


def _proxied(stage: Stage) -> tuple[Proxy, str]:
    """A proxy before the coordinator and the address behind it, when the coordinator answers there."""
    parts = urlsplit(stage.wish.address)
    if parts.scheme != "http":
        raise Skipped("the coordinator is reached by TLS, which a proxy in between would break")
    proxy = Proxy(parts.hostname or "127.0.0.1", parts.port or 80)
    address = f"http://127.0.0.1:{proxy.port}{parts.path}"
    try:
        answer = httpx.get(f"{address}/readyz", timeout=10, trust_env=False)
    except httpx.HTTPError as error:
        proxy.close()
        raise Skipped(
            f"the coordinator cannot be reached through a proxy on this machine: {error}"
        ) from error
    if answer.status_code != 200:
        proxy.close()
        raise Skipped(f"through a proxy on this machine the coordinator answers {answer.status_code}")
    return proxy, address
