"""`buildmill runner drain` and `handover`: what an operator says to the runner of this machine."""

import sys
import time
from pathlib import Path
from typing import Final

import click

from runner.control import NoAnswer, NobodyThere, Standing, Word, ask
from runner.errors import BadSetup
from runner.journal import open_journals
from runner.settings import Settings
from runner.state_dir import FolderInUse, StateLock

ANSWER_S: Final = 10.0
HANDOVER_S: Final = 30.0
LOOK_S: Final = 0.5
SOON_S: Final = 0.05
DRAIN_LONGEST_S: Final = 24 * 3600.0

NO_ANSWER: Final = 1
NOBODY: Final = 3
STEPS_LEFT: Final = 4

of_state = click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="Folder of the runner (default BUILDMILL_STATE or /var/lib/buildmill).",
)


@click.command("drain")
@of_state
@click.option("--wait", is_flag=True, help="Come back when the runner has ended, and tell meanwhile.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    default=DRAIN_LONGEST_S,
    show_default=True,
    help="With --wait: at most so many seconds.",
)
def drain(state: Path | None, wait: bool, timeout_s: float) -> None:
    """Let the runner of this machine finish its steps, take no others, and end.

    Ends with 0 when that is done (without --wait: when it is ordered), with 1 when the runner does not
    answer, with 3 when no runner uses the state folder, and with 4 when steps still run as the time is over,
    or were left to the next process because the runner was killed.
    """
    folder = _folder_of(state)
    standing = _ask_or_end(folder, Word.DRAIN)
    click.echo(f"draining: {standing.sentence}")
    if not wait:
        return
    if not _watch_until_ended(folder, standing, until=time.monotonic() + timeout_s):
        click.echo(f"steps still run after {timeout_s:g} s; they go on", err=True)
        sys.exit(STEPS_LEFT)
    left = len(open_journals(folder))
    if left:
        click.echo(f"the runner has ended and left {left} steps to its next process", err=True)
        sys.exit(STEPS_LEFT)
    click.echo("drained: the runner has ended")


@click.command("handover")
@of_state
def handover(state: Path | None) -> None:
    """End the runner of this machine at once and leave its steps running for the next process.

    Start that one within a minute. `buildmill runner --handover` does both.
    Ends with 0 when the runner has ended, with 1 when it does not answer, with 3 when there is none.
    """
    folder = _folder_of(state)
    standing = _ask_or_end(folder, Word.HANDOVER)
    if not _watch_until_ended(folder, standing, until=time.monotonic() + HANDOVER_S, every_s=SOON_S):
        click.echo(f"process {standing.pid} was asked and has not ended within {HANDOVER_S:g} s", err=True)
        sys.exit(NO_ANSWER)
    click.echo(f"handed over: {standing.sentence}; start the next process within 60 s")


def take_over(state: Path, *, patience_s: float = HANDOVER_S) -> StateLock:
    """Have the process that runs on this folder leave its steps as they are, and take its place."""
    until = time.monotonic() + patience_s
    asked = ""
    while True:
        try:
            return StateLock(state)
        except FolderInUse as error:
            if time.monotonic() > until:
                raise BadSetup(
                    f"nobody hands over within {patience_s:g} s ({asked or 'it does not end'}): {error}; "
                    "to end that process with signal KILL ends no step either"
                ) from error
        if not asked:
            asked = _ask_to_leave(state, until)
        time.sleep(SOON_S)


def _ask_to_leave(state: Path, until: float) -> str:
    """Ask once more later where nobody listens yet; the answer, or why there is none."""
    try:
        standing = ask(state, Word.HANDOVER, timeout_s=max(SOON_S, min(ANSWER_S, until - time.monotonic())))
    except NobodyThere:
        return ""  # it starts or ends right now
    except NoAnswer as error:
        return str(error)
    click.echo(f"handed over: {standing.sentence}")
    return "it was asked and does not end"


def _folder_of(state: Path | None) -> Path:
    return (state or Settings().state).absolute()


def _ask_or_end(folder: Path, word: Word) -> Standing:
    try:
        return ask(folder, word, timeout_s=ANSWER_S)
    except NobodyThere as error:
        click.echo(str(error), err=True)
        sys.exit(NOBODY)
    except NoAnswer as error:
        click.echo(str(error), err=True)
        sys.exit(NO_ANSWER)


def _watch_until_ended(folder: Path, standing: Standing, *, until: float, every_s: float = LOOK_S) -> bool:
    """Tell each change in what runs; False when the time is over before that process has ended."""
    while time.monotonic() < until:
        try:
            now = ask(folder, Word.STATUS, timeout_s=ANSWER_S)
        except NobodyThere:
            return True
        except NoAnswer:
            now = standing  # it ends right now, or is very busy; the next look tells
        if now.pid != standing.pid:
            return True  # its successor is there already
        if now.running != standing.running:
            click.echo("\n".join([now.sentence, *(f"  {one}" for one in now.running)]))
        standing = now
        time.sleep(min(every_s, max(0.0, until - time.monotonic())))
    return False
