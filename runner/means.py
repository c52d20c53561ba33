"""What every step run works with: the parts of this runner, made once at its start."""

from dataclasses import dataclass

from runner.blobs import LocalBlobs
from runner.cache import CacheStore
from runner.client import Client
from runner.disk import DiskGuard
from runner.executor.base import Executor
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
