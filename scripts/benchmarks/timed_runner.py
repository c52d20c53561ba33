"""The real runner with one slot, whose log lines carry the kernel's clock: COORDINATOR STATE.

The clock is the one that /proc/uptime shows inside containers too.
"""

import sys
import time
from pathlib import Path

import structlog
from structlog.typing import EventDict, WrappedLogger

from runner.cli import make_agent, obey_signals
from runner.settings import Settings
from runner.state_dir import StateLock


def uptime_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _add_time(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event["uptime"] = uptime_s()
    return event


def main(coordinator: str, state: str) -> None:
    structlog.configure(
        processors=[_add_time, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    settings = Settings(coordinator=coordinator, state=Path(state), slots=1)
    with StateLock(settings.state):
        agent = make_agent(settings)
        obey_signals(lambda: agent)
        agent.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
