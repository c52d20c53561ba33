"""Keeps the coordinator small: what retention lets go, in batches, and files that nobody knows.

Each batch is one short transaction, and others write in between. First a mark hides what goes, then rows and
files follow, the bytes of blobs last: who is killed in between leaves marks, which the next run goes on
from, and at worst files without a row, which `sweep` finds.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import structlog

from coordinator.actions.delete_expired import delete_expired
from coordinator.actions.drop_blobs import drop_blobs
from coordinator.actions.mark_expired import mark_expired
from coordinator.actions.plan_retention import plan_retention
from coordinator.api.state import AppState
from coordinator.errors import CoordinatorError
from coordinator.rules.retention import Part
from coordinator.settings import Settings
from coordinator.store import retention
from coordinator.store.blob_files import BlobFiles
from coordinator.store.lanes import Lanes
from coordinator.store.log_files import LogFiles
from shared.clock import Clock

T = TypeVar("T")
log = structlog.get_logger()

FIRST_AFTER_S = 60.0
EVERY_S = 300.0
SWEEP_EVERY_S = 6 * 3600.0
UPLOAD_LIFE_S = 24 * 3600.0
PAUSE_S = 0.05
MARKS_AT_ONCE = 50
BUILDS_AT_ONCE = 500
BLOBS_AT_ONCE = 100
TOMBSTONES_AT_ONCE = 1000


@dataclass
class Done:
    """What one run has done."""

    builds: int = 0
    logs: int = 0
    artifacts: int = 0
    files: int = 0
    bytes: int = 0
    blobs: int = 0
    blob_bytes: int = 0
    tombstones: int = 0
    orphans: int = 0
    failed: int = 0


@dataclass
class Upkeep:
    """One run: what it works with, what it has done, and whom it tells how far it is."""

    lanes: Lanes
    settings: Settings
    logs: LogFiles
    blobs: BlobFiles
    clock: Clock
    pause_s: float = PAUSE_S
    tell: Callable[[str], None] = lambda said: None
    done: Done = field(default_factory=Done)

    async def expire(self) -> Done:
        """Let go what the rules of every project let go, and finish what a former run has begun."""
        after = ""
        while projects := await self.lanes.read(partial(retention.list_projects, after=after)):
            for project in projects:
                await self._try_to_expire(project)
            after = projects[-1].id
        await self._delete_blobs()
        await self._delete_tombstones()
        return self.done

    async def sweep(self) -> Done:
        """Find what nobody needs by looking at everything: uploads nobody completed, files without a row."""
        await self._mark_uploads()
        await self._drop_orphans()
        return self.done

    async def _write(self, action: Callable[..., T], /, *args: Any, **named: Any) -> T:
        """One batch; whoever waits to write comes first."""
        answer = await self.lanes.write(lambda tx: action(tx, *args, **named))
        await asyncio.sleep(self.pause_s)
        return answer

    # --- projects

    async def _try_to_expire(self, project: Any) -> None:
        try:
            await self._expire_project(project)
        except Exception:  # whatever is wrong with it, the projects behind it fill the disk meanwhile
            self.done.failed += 1
            log.exception("project_not_expired", project=project.id)

    async def _expire_project(self, project: Any) -> None:
        now = self.clock()
        plan = await self.lanes.read(
            partial(plan_retention, settings=self.settings, project=project, now=now)
        )
        for part, expiries in groupby(plan.expiries, key=lambda one: one.part):
            for batch in _batches(list(expiries), MARKS_AT_ONCE):
                marked = await self._write(mark_expired, project, part, batch, now=now)
                self._count(part, len(marked))
                self.done.files += sum(one.files for one in marked)
                self.done.bytes += sum(one.size for one in marked)
        gone = 0
        look = partial(retention.list_marked, project_id=project.id, limit=BUILDS_AT_ONCE)
        while builds := await self.lanes.read(look):
            for build in builds:
                await self._delete_marked(build)
            gone += len(builds)
            self.tell(f"project {project.name} ({project.id}): {gone} builds dealt with")

    def _count(self, part: Part, builds: int) -> None:
        if part is Part.BUILD:
            self.done.builds += builds
        elif part is Part.LOGS:
            self.done.logs += builds
        else:
            self.done.artifacts += builds

    async def _delete_marked(self, build: retention.Marked) -> None:
        """Artifacts, then logs, then the build. The files of logs go before the rows that lead to them."""
        if build.has_artifacts:
            await self._delete_rows(build, Part.ARTIFACTS)
        if build.is_whole:
            await asyncio.to_thread(self.logs.remove_build, build.id)
        else:
            logs = await self.lanes.read(partial(retention.list_expired_logs, build_id=build.id))
            await asyncio.to_thread(self._remove_logs, build.id, logs)
        if build.has_logs:
            await self._delete_rows(build, Part.LOGS)
        if build.is_whole:
            await self._write(delete_expired, build.id, Part.BUILD, now=self.clock())

    async def _delete_rows(self, build: retention.Marked, part: Part) -> None:
        while await self._write(delete_expired, build.id, part, now=self.clock()):
            self.tell(f"build {build.id}: deleting {part}")

    def _remove_logs(self, build_id: str, logs: list[tuple[str, int]]) -> None:
        for step_id, attempt in logs:
            self.logs.remove(build_id, step_id, attempt)

    async def _delete_tombstones(self) -> None:
        before = self.clock() - timedelta(days=self.settings.retain_tombstone_days)
        delete = partial(retention.delete_tombstones, before=before, limit=TOMBSTONES_AT_ONCE)
        while count := await self._write(delete):
            self.done.tombstones += count

    # --- blobs

    async def _delete_blobs(self) -> None:
        """Bytes that have been unused for long enough: first the row, after its commit the file."""
        before = self.clock() - timedelta(hours=self.settings.retain_unused_hours)
        seen = BLOBS_AT_ONCE
        while seen == BLOBS_AT_ONCE:
            gone, seen = await self._write(retention.delete_unused_blobs, before=before, limit=BLOBS_AT_ONCE)
            self.done.blobs += len(gone)
            self.done.blob_bytes += sum(size for _, _, size in gone)
            await self._drop({sha256 for _, sha256, _ in gone})
            if gone:
                self.tell(f"{self.done.blobs} blobs deleted")

    async def _drop(self, digests: set[str]) -> int:
        if not digests:
            return 0
        aside = await self._write(drop_blobs, self.blobs, digests)
        await asyncio.to_thread(_unlink_all, aside)
        return len(aside)

    # --- the sweep

    async def _mark_uploads(self) -> None:
        """What was uploaded and never named by a completion is unused."""
        now = self.clock()
        before = now - timedelta(hours=self.settings.retain_unused_hours)
        place: tuple[str, str] | None = ("", "")
        while place is not None:
            look = partial(retention.list_unused, after=place, before=before, limit=BUILDS_AT_ONCE)
            found, place = await self.lanes.read(look)
            for project_id, pairs in groupby(found, key=lambda pair: pair[0]):
                digests = {sha256 for _, sha256 in pairs}
                await self._write(retention.mark_unused, project_id, digests, now=now)

    async def _drop_orphans(self) -> None:
        swept = partial(self.blobs.sweep, older_than_s=UPLOAD_LIFE_S, now_s=time.time())
        self.done.orphans += await asyncio.to_thread(swept)
        age = {
            "older_than_s": max(1, self.settings.retain_unused_hours) * 3600.0,
            "now_s": time.time(),
        }
        for digests in await asyncio.to_thread(lambda: list(self.blobs.list_blobs(**age))):
            for batch in _batches(digests, BLOBS_AT_ONCE):
                known = await self.lanes.read(partial(retention.list_known_blobs, digests=batch))
                self.done.orphans += await self._drop(set(batch) - known)
        for build_ids in await asyncio.to_thread(lambda: list(self.logs.list_builds(**age))):
            for batch in _batches(build_ids, BUILDS_AT_ONCE):
                known = await self.lanes.read(partial(retention.list_known_builds, build_ids=batch))
                for build_id in set(batch) - known:
                    await asyncio.to_thread(self.logs.remove_build, build_id)
                    self.done.orphans += 1


def _batches(things: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(things), size):
        yield things[start : start + size]


def _unlink_all(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


async def do_upkeep(state: AppState) -> None:
    """Until cancelled: every few minutes what is due, a few times a day the sweep."""
    swept_at = float("-inf")
    await asyncio.sleep(FIRST_AFTER_S)
    while True:
        upkeep = Upkeep(state.lanes, state.settings, state.site.logs, state.site.blobs, state.clock)
        try:
            if time.monotonic() - swept_at > SWEEP_EVERY_S:
                swept_at = time.monotonic()
                await upkeep.sweep()
            await upkeep.expire()
        except (CoordinatorError, OSError) as error:
            log.warning("upkeep_failed", cause=str(error))
        except Exception:  # the last line of defence: one bad day must not end the upkeep for good
            log.exception("upkeep_failed")
        if upkeep.done != Done():
            log.info("expired", **asdict(upkeep.done))
        await asyncio.sleep(EVERY_S)
