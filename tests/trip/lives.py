"""A runner that dies at places it is told, as a kill would end it, and comes back at once each time.

    python -m tests.trip.lives FILE -- OPTIONS OF THE RUNNER

A step named `before-running-1` ends the process right before the first write of its journal that says
`running`; `after-...` right behind it. Each death is a line in FILE. The next life is a fork of a process
that has loaded everything, so that coming back takes no time in which races could hide.
"""

import ctypes
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from runner import journal
from runner.cli import runner

PR_SET_PDEATHSIG = 1
MOST_LIVES = 100


@dataclass(frozen=True)
class Death:
    """Which step's place it was, what its journal said then, and when, on the machine's monotonic clock."""

    step: str
    phase: str
    at: float


def deaths_in(file: Path) -> list[Death]:
    if not file.exists():
        return []
    return [Death(**json.loads(line)) for line in file.read_text().splitlines()]


def die_where_told(file: Path) -> None:
    """From here on the journals of this process are written until one of them names the place."""
    died = {death.step for death in deaths_in(file)}
    written: Counter[tuple[str, str]] = Counter()
    write_whole = journal.write_whole

    def write(path: Path, content: bytes) -> None:
        said = json.loads(content)
        name, phase = said["claim"]["name"], said["phase"]
        written[name, phase] += 1
        place = f"{phase}-{written[name, phase]}"
        if name == f"before-{place}" and name not in died:
            die(name, phase)
        write_whole(path, content)
        if name == f"after-{place}" and name not in died:
            die(name, phase)

    def die(name: str, phase: str) -> None:
        with file.open("a") as deaths:
            deaths.write(json.dumps(asdict(Death(name, phase, time.monotonic()))) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)

    journal.write_whole = write


def main() -> None:
    file, options = Path(sys.argv[1]), sys.argv[3:]
    for _ in range(MOST_LIVES):
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                die_where_told(file)
                runner.main(options, prog_name="runner")
            os._exit(1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _frame, child=child: os.kill(child, number))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            sys.exit(os.waitstatus_to_exitcode(status))
    sys.exit("too many lives")


if __name__ == "__main__":
    main()
