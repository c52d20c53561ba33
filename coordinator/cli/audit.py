"""`buildmill audit verify`: says whether the audit trail is what was written, and which rows are not."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import click
from sqlmodel import Session

from coordinator.actions.verify_trail import Checked, Finding, verify_trail
from coordinator.cli.administer import require_data_folder
from coordinator.cli.serve import explaining_the_database, read_settings
from coordinator.keys import checkpoints_path, find_audit_key
from coordinator.store.checkpoint_file import read_lines
from coordinator.store.dialect import open_to_look
from coordinator.store.migrate import DatabaseIsOlder, require_head

T = TypeVar("T")

MOST_SHOWN = 100
PROGRESS_S = 2.0


@click.group("audit")
def audit() -> None:
    """The audit trail: who changed what, and who was turned away."""


@audit.command("verify")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of database, checkpoints and key (default ./buildmill-data).",
)
@click.option("--database", help="Database URL; SQLite in the data folder when absent.")
def verify_command(**options: Any) -> None:
    """Find rows of the audit trail that were changed, swapped, inserted or removed.

    Every row is held against the hash that it was sealed with, and every chain against the checkpoints in the
    data folder. Nothing is changed, and the coordinator may run. The exit code is 1 when something was found.
    """
    settings = read_settings(options)
    require_data_folder(settings)
    checked, count = Checked(), 0
    with explaining_the_database(), _explaining_an_old_one():
        for finding in _findings(settings.data, settings.database_url, checked):
            count += 1
            if count <= MOST_SHOWN:
                click.echo(_spelled(finding))
    if count > MOST_SHOWN:
        click.echo(f"and {count - MOST_SHOWN} more")
    if checked.unsealed:
        click.echo(_unsealed(checked))
    _say_what_was_checked(checked, count)
    if count:
        raise SystemExit(1)


def _findings(data: Path, url: str, checked: Checked) -> Iterator[Finding]:
    engine = open_to_look(url)
    try:
        require_head(engine)

        progress = _Progress(checked)

        def read(action: Callable[[Session], T]) -> T:
            progress.show()
            with Session(engine) as tx:
                return action(tx)

        path, key = checkpoints_path(data), find_audit_key(data)
        has_lines = path.exists()
        lines = read_lines(path) if has_lines and key is not None else iter(())
        yield from verify_trail(read, lines, key or b"", checked)
        if has_lines and key is None:
            yield Finding(
                "checkpoint", f"{data / 'keys' / 'audit-key'} is not there: nothing verifies {path}"
            )
        if checked.chains and not has_lines:
            yield Finding(
                "checkpoint", f"{path} is not there: rows that were sealed last may have gone unseen"
            )
    finally:
        engine.dispose()


@contextmanager
def _explaining_an_old_one() -> Iterator[None]:
    try:
        yield
    except DatabaseIsOlder as error:
        raise click.ClickException(f"{error}: start the coordinator, or run `buildmill migrate`") from error


@dataclass
class _Progress:
    """Told to standard error, so that the findings can go elsewhere."""

    checked: Checked
    told_at: float = field(default_factory=time.monotonic)

    def show(self) -> None:
        if time.monotonic() - self.told_at >= PROGRESS_S:
            self.told_at = time.monotonic()
            click.echo(
                f"verified {self.checked.rows} rows and {self.checked.checkpoints} checkpoints", err=True
            )


def _spelled(finding: Finding) -> str:
    where = [f"chain {finding.chain}"] if finding.chain else []
    where += [f"seq {finding.seq}"] if finding.seq is not None else []
    where += [f"id {finding.row_id}"] if finding.row_id else []
    return f"{finding.what}: " + ", ".join(where) + (": " if where else "") + finding.sentence


def _unsealed(checked: Checked) -> str:
    since = checked.unsealed_since
    age = 0.0 if since is None else max(0.0, (datetime.now(UTC) - since).total_seconds())
    return f"{checked.unsealed} rows wait to be sealed, the first for {age:.0f} s"


def _say_what_was_checked(checked: Checked, count: int) -> None:
    what = f"{checked.rows} rows in {checked.chains} chains, {checked.checkpoints} checkpoints"
    click.echo(f"{what}: " + ("nothing was changed" if not count else f"{count} findings"))
