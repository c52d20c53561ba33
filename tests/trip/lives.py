"""Programs that die at places they are told, as a kill would end them, and come back at once each time.

    python -m tests.trip.lives FILE runner OPTIONS
    python -m tests.trip.lives FILE coordinator OPTIONS

A runner's place is the name of a step: `before-running-1` ends the process right before the first write of
that step's journal that says `running`, `after-...` right behind it. A coordinator dies once when a request
of each kind in BEFORE arrives, and once when one in AFTER has had its effect and no answer. Each death is a
line in FILE. The next life is a fork of a process that has loaded everything: no pause in which races hide.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from starlette.types import Message, Receive, Scope, Send

from coordinator.api import server
from coordinator.cli.serve import coordinator
from runner import journal
from runner.cli import runner
from tests.trip.faults import verb_of

PR_SET_PDEATHSIG = 1
MOST_LIVES = 100
BEFORE = ("complete",)
AFTER = ("acquire", "start", "log", "put_blob", "complete")


@dataclass(frozen=True)
class Death:
    """At which place it was, what was just done, and when, on the machine's monotonic clock."""

    place: str
    doing: str
    at: float


def deaths_in(file: Path) -> list[Death]:
    if not file.exists():
        return []
    return [Death(**json.loads(line)) for line in file.read_text().splitlines()]


def make_die(file: Path) -> Callable[[str, str], None]:
    """Dies, unless a former life has died at this place."""
    died = {death.place for death in deaths_in(file)}

    def die(place: str, doing: str) -> None:
        if place in died:
            return
        with file.open("a") as deaths:
            deaths.write(json.dumps(asdict(Death(place, doing, time.monotonic()))) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    return die


def run_runner(file: Path, options: list[str]) -> None:
    die, written = make_die(file), Counter[tuple[str, str]]()
    write_whole = journal.write_whole

    def write(path: Path, content: bytes) -> None:
        said = json.loads(content)
        name, phase = said["claim"]["name"], said["phase"]
        written[name, phase] += 1
        place = f"{phase}-{written[name, phase]}"
        if name == f"before-{place}":
            die(name, phase)
        write_whole(path, content)
        if name == f"after-{place}":
            die(name, phase)

    journal.write_whole = write
    runner.main(options, prog_name="runner")


def run_coordinator(file: Path, options: list[str]) -> None:
    die, make_server = make_die(file), server.make_server

    def make_mortal(app, **more):
        async def mortal(scope: Scope, receive: Receive, send: Send) -> None:
            verb = verb_of(scope["method"], scope["path"]) if scope["type"] == "http" else ""
            if verb in BEFORE:
                die(f"before-{verb}", verb)

            async def send_or_die(message: Message) -> None:
                if verb in AFTER and message.get("status") in (200, 201):
                    die(f"after-{verb}", verb)
                await send(message)

            await app(scope, receive, send_or_die)

        return make_server(mortal, **more)

    server.make_server = make_mortal
    coordinator.main(options, prog_name="coordinator")


def main() -> None:
    file, program, options = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    run = {"runner": run_runner, "coordinator": run_coordinator}[program]
    for _ in range(MOST_LIVES):
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                run(file, options)
            os._exit(1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _frame, child=child: os.kill(child, number))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
    sys.exit("too many lives")


if __name__ == "__main__":
    main()
