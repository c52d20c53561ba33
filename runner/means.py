"""What every step run works with: the parts of this runner, made once at its start."""

from dataclasses import dataclass

from runner.blobs import LocalBlobs
from runner.cache import CacheStore
from runner.client import Client
from runner.disk import DiskGuard
from runner.executor.base import Executor
from runner.journal import Journal
from runner.source import SourceCache
from runner.trash import Trash
from runner.workspace import Workspaces


@dataclass(frozen=True)
class Means:
    """Shared by all attempts; each part may be used by several threads."""

    runner_id: str
    client: Client
    executor: Executor
    sources: SourceCache
    workspaces: Workspaces
    caches: CacheStore
    blobs: LocalBlobs
    trash: Trash
    disk: DiskGuard
    secrets: tuple[bytes, ...] = ()
    former_ids: frozenset[str] = frozenset()

    def runner_of(self, journal: Journal) -> str:
        """Who began the attempt: this runner, or who it was before it registered anew.

        In a copy of another's state folder the attempts are not ours, and nothing of theirs may be touched.
        """
        return journal.runner if journal.runner in self.former_ids else self.runner_id
