"""`buildmill retention`: lets go at once what a coordinator lets go by itself, or says what that is."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from coordinator.actions.show_retention import RetentionView, rehearse
from coordinator.cli.administer import require_data_folder
from coordinator.cli.serve import (
    DataFolderInUse,
    explaining_the_database,
    only_process,
    private_files,
    read_settings,
)
from coordinator.settings import Settings
from coordinator.store import retention
from coordinator.store.blob_files import BlobFiles
from coordinator.store.dialect import open_database
from coordinator.store.lanes import Lanes
from coordinator.store.log_files import LogFiles
from coordinator.store.migrate import migrate
from coordinator.timekeeping import begin_clock
from coordinator.upkeep import Done, Upkeep

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@click.command("retention")
@click.option("--dry-run", is_flag=True, help="Only list what would go, with sizes and reasons.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder of database, logs and blobs (default ./buildmill-data).",
)
@click.option("--database", help="Database URL; SQLite in the data folder when absent.")
def retention_command(dry_run: bool, **options: Any) -> None:
    """Delete the logs, artifacts and builds that the rules do not keep.

    A running coordinator does this by itself every few minutes, and tells what is due at
    GET /api/projects/{id}/retention. With SQLite this command needs the data folder for itself.

    The rules are settings (BUILDMILL_RETAIN_...) and each project's own; without any, everything is kept.
    """
    settings = read_settings(options)
    require_data_folder(settings)
    with _alone(settings), private_files(), explaining_the_database(), _opened(settings) as lanes:
        if dry_run:
            _rehearse(lanes, settings)
        else:
            done = asyncio.run(_run(lanes, settings))
            _say_done(done)
            if done.failed:
                raise click.ClickException(f"{done.failed} projects could not be dealt with; see the log")


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    try:
        with only_process(settings):
            yield
    except DataFolderInUse as error:
        raise click.ClickException(
            f"a coordinator uses the data folder {settings.data} and does this by itself: "
            "ask it at GET /api/projects/{id}/retention, or stop it first"
        ) from error


@contextmanager
def _opened(settings: Settings) -> Iterator[Lanes]:
    database = open_database(settings.database_url)
    try:
        migrate(database)
        lanes = Lanes(database, writers=1, readers=1)
        try:
            yield lanes
        finally:
            lanes.close()
    finally:
        database.dispose()


def _rehearse(lanes: Lanes, settings: Settings) -> None:
    now = begin_clock(lanes)()
    total, size, after = 0, 0, ""
    while projects := lanes.write_and_wait(lambda tx: retention.list_projects(tx, after=after)):  # noqa: B023
        for project in projects:
            view = lanes.write_and_wait(lambda tx: rehearse(tx, settings, project, now=now))  # noqa: B023
            _say_view(project, view)
            total += len(view.expires)
            size += view.size
        after = projects[-1].id
    click.echo(f"{total} would go, {shown_size(size)}; nothing was changed")


def _say_view(project: Any, view: RetentionView) -> None:
    if not view.expires:
        return
    click.echo(f"project {project.name} ({project.id})")
    for one in view.expires:
        what = "all of it" if one.expiry.part == "build" else one.expiry.part
        click.echo(
            f"  build {one.expiry.number} ({one.expiry.build_id}): {what}, {one.files} files, "
            f"{shown_size(one.size)}, by {str(one.expiry.why).replace('_', ' ')}"
        )


async def _run(lanes: Lanes, settings: Settings) -> Done:
    logs, blobs = LogFiles(settings.data / "logs"), BlobFiles(settings.data / "blobs")
    upkeep = Upkeep(lanes, settings, logs, blobs, begin_clock(lanes), pause_s=0, tell=click.echo)
    click.echo("looking for what nobody needs")
    await upkeep.sweep()
    return await upkeep.expire()


def _say_done(done: Done) -> None:
    click.echo(
        f"{done.builds} builds, logs of {done.logs} and artifacts of {done.artifacts} more: "
        f"{done.files} files, {shown_size(done.bytes)}"
    )
    click.echo(f"{done.blobs} blobs freed, {shown_size(done.blob_bytes)}; {done.orphans} stray files removed")


def shown_size(size: float) -> str:
    """Bytes as people read them."""
    for unit in UNITS[:-1]:
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} {UNITS[-1]}"
