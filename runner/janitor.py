"""Keeps the machine clean: leftovers of a former life at the start, old layers and caches when idle."""

import threading
import time
from pathlib import Path

import structlog

from runner.errors import RunnerError
from runner.journal import open_journals
from runner.means import Means

log = structlog.get_logger()

EVERY_S = 300.0


class Janitor:
    """Looks around at the start and every few minutes, in a thread of its own."""

    def __init__(self, means: Means, state: Path, *, source_bytes: int) -> None:
        self._means = means
        self._state = state
        self._source_bytes = source_bytes
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="janitor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(10)

    def sweep_leftovers(self) -> None:
        """Remove what no journal knows: containers, and folders of attempts that were done."""
        known = {(journal.step_id, journal.attempt) for journal in open_journals(self._state)}
        for leftover in self._means.executor.leftovers():
            if (leftover.step_id, leftover.attempt) not in known:
                log.info("leftover_removed", name=leftover.name, was_running=leftover.is_running)
                self._means.executor.remove_leftover(leftover)
        for folder in (self._state / "a").glob("*/*"):
            if folder.name.isdecimal() and (folder.parent.name, int(folder.name)) not in known:
                self._close(folder)

    def _close(self, folder: Path) -> None:
        workspace = self._means.workspaces.find(folder)
        if workspace is not None:
            self._means.workspaces.close(workspace)
        for index in range(32):
            cache = self._means.caches.find(folder, index)
            if cache is not None:
                self._means.caches.discard(cache)
        self._means.trash.throw(folder)

    def _run(self) -> None:
        while not self._stopping.wait(EVERY_S):
            try:
                self._prune()
            except (RunnerError, OSError) as error:
                log.warning("pruning_failed", cause=str(error))

    def _prune(self) -> None:
        folders = [journal.folder for journal in open_journals(self._state)]
        pinned = self._means.workspaces.pinned(folders)
        self._means.caches.evict()
        self._means.sources.prune(pinned, self._source_bytes)
        self._means.workspaces.prune(pinned)
        self._means.blobs.evict(now=time.time())
