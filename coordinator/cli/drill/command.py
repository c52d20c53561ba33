"""`buildmill drill`."""

import json
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import click

from coordinator.cli.drill.engine import Engine
from coordinator.cli.drill.errors import DrillError
from coordinator.cli.drill.rehearsal import FAULTS, Fault, learn_timings, rehearse
from coordinator.cli.drill.report import Screen, header_line, record_of, rows_of, verdict_line
from coordinator.cli.drill.result import FaultResult, is_clean
from coordinator.cli.drill.stage import Stage, Wish, make_folder
from coordinator.cli.drill.user_api import UserApi
from shared.clock import to_wire, utc_now

IMAGES = ("busybox:1", "buildmill/busybox:1")  # the second is what scripts/images makes without a registry
LIMIT_S = 240.0  # and what is left of five minutes is for cleaning up


class CannotDrill(click.ClickException):
    """Nothing was tried; said in one line."""

    exit_code = 2


@click.command()
@click.option(
    "--coordinator",
    default="http://127.0.0.1:3000",
    show_default=True,
    help="Address of the running coordinator to be tried.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, readable=True),
    help="File with a user's token, for a coordinator with --auth token.",
)
@click.option(
    "--executor",
    type=click.Choice(["docker", "process"]),
    default="docker",
    show_default=True,
    help="How the drill's own runners run steps; process needs no engine.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 30),
    default=6,
    show_default=True,
    help="Steps of the build that is killed.",
)
@click.option(
    "--image",
    help=f"Image of the steps; needs a shell. Without it {' or '.join(IMAGES)}, whichever is here.",
)
@click.option("--keep", is_flag=True, help="Keep the drill's project, its builds and their logs.")
@click.option("--only", default="", help="Names of faults, separated by commas; all of them when absent.")
@click.option(
    "--json",
    "record",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File that gets the whole record: figures, findings, logs.",
)
def drill(
    coordinator: str,
    token_file: Path | None,
    executor: str,
    steps: int,
    image: str | None,
    keep: bool,
    only: str,
    record: Path | None,
) -> None:
    """Cause faults on purpose and see whether the promises hold.

    The drill has a project, labels and runners of its own: no step and no runner of anybody else is touched,
    and no process is signalled that it has not started. It takes five minutes at most.

    The exit code is 0 when nothing was doubled or lost and every promised time was kept, 1 when not, and 2
    when nothing could be tried. Interrupted, it removes what it has made.
    """
    faults = chosen(only)
    address = coordinator.rstrip("/")
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise click.BadParameter("must begin with http:// or https://", param_hint="--coordinator")
    if record is not None and not record.absolute().parent.is_dir():
        raise click.BadParameter(f"{record.absolute().parent} is no folder", param_hint="--json")
    token = token_file.read_text().strip() if token_file else ""
    wish = Wish(
        address, token, token_file.absolute() if token_file else None, executor, image or "", steps, keep
    )
    screen = Screen()
    began = time.monotonic()
    results: list[FaultResult] = []
    stage = open_stage(wish, screen)
    with interrupted_by_term():
        try:
            prepare(stage)
            screen.line(f"drill {stage.drill}: {address}, executor {executor}, {len(faults)} faults")
            screen.line(header_line())
            for result in rehearse(stage, faults, began=screen.begin):
                results.append(result)
                for row in rows_of(result):
                    screen.line(row)
        except KeyboardInterrupt:
            screen.line("interrupted: removing what the drill has made")
        finally:
            problems = close_undisturbed(stage)
    is_whole = len(results) == len(faults)
    took_s = time.monotonic() - began
    for problem in problems:
        screen.line(f"! {problem}")
    verdict = (
        verdict_line(results, took_s=took_s) if is_whole else "verdict: none, the drill was not finished"
    )
    screen.line(verdict)
    if record is not None:
        about = _about(stage, problems, is_whole=is_whole)
        record.write_text(json.dumps(record_of(results, about, took_s=took_s), indent=2) + "\n")
    sys.exit(0 if is_whole and is_clean(results) and not problems else 1)


def chosen(only: str) -> list[Fault]:
    """The faults that --only names, in the order of the drill."""
    names = {name.strip() for name in only.split(",") if name.strip()}
    unknown = names - {fault.name for fault in FAULTS}
    if unknown:
        known = ", ".join(fault.name for fault in FAULTS)
        raise click.BadParameter(
            f"no such fault: {', '.join(sorted(unknown))} (there are {known})", param_hint="--only"
        )
    return [fault for fault in FAULTS if not names or fault.name in names]


def open_stage(wish: Wish, screen: Screen) -> Stage:
    """A stage on which nothing has been made yet; CannotDrill where none can be had."""
    api = UserApi(wish.address, wish.token)
    engine = Engine() if wish.executor == "docker" else None
    images = [wish.image] if wish.image else list(IMAGES)
    image = images[0]
    try:
        api.require_usable()
        if engine is not None:
            engine.require_usable()
            image = engine.require_one_of(images)
    except DrillError as error:
        raise CannotDrill(str(error)) from error
    name = f"drill-{secrets.token_hex(4)}"
    ends_at = time.monotonic() + LIMIT_S
    return Stage(replace(wish, image=image), name, api, make_folder(), ends_at, screen.progress, engine)


def prepare(stage: Stage) -> None:
    """The drill's project, and what the coordinator says of its timings."""
    try:
        stage.prepare()
        learn_timings(stage)
    except DrillError as error:
        raise CannotDrill(f"the drill cannot begin: {error}") from error


def close_undisturbed(stage: Stage) -> list[str]:
    """Remove everything; a second interrupt does not leave half of it behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return stage.close()


@contextmanager
def interrupted_by_term() -> Iterator[None]:
    """TERM does what Ctrl-C does, so that nothing stays behind."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _about(stage: Stage, problems: Sequence[str], *, is_whole: bool) -> dict[str, Any]:
    wish = stage.wish
    return {
        "drill": stage.drill,
        "at": to_wire(utc_now()),
        "coordinator": wish.address,
        "executor": wish.executor,
        "image": wish.image,
        "steps": wish.steps,
        "timings": stage.timings.model_dump(by_alias=True),
        "finished": is_whole,
        "problems": list(problems),
    }
