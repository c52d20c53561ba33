"""What one step leaves in its folders never stops the next one, with root or without."""

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from runner.cache import CacheStore
from runner.layers import CopyLayers, Layers, OverlayLayers
from runner.trash import Trash
from runner.workspace import Workspaces
from shared.protocol import Mount
from tests.runner.state_folder import NOBODY, a_state_folder, as_nobody, needs_root

CACHE = Mount(path="/cache", key="project-1", trust="default")


def misbehave(folder: Path) -> None:
    """Leave folders that are closed to everybody, and what is no file at all."""
    inner = folder / "closed/inner"
    inner.mkdir(parents=True)
    (inner / "file").write_text("1")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s"))
    (folder / "read-only").mkdir()
    (folder / "read-only/file").write_text("1")
    (folder / "read-only").chmod(0o555)
    (folder / "secret").write_text("1")
    (folder / "secret").chmod(0)
    if os.geteuid() == 0:
        for name in ("secret", "closed", "pipe"):
            os.chown(folder / name, 12345, 12345)
    inner.chmod(0)
    inner.parent.chmod(0)


def run_steps(state: Path, new_layers: Callable[[Path], Layers]) -> None:
    """Three attempts one after the other; each finds an empty workspace that it can write to."""
    trash, layers = Trash(state), new_layers(state)
    workspaces, caches = Workspaces(state, layers, trash), CacheStore(state, layers, trash)
    for number in range(1, 4):
        attempt = state / "a" / "step-1" / str(number)
        attempt.mkdir(parents=True)
        workspace = workspaces.build(attempt, checkout=None, inputs=[], fetch=Path, note=print)
        cache = caches.open(attempt, 0, CACHE)
        assert list(workspace.path.iterdir()) == []
        (workspace.path / "mine").write_text("1")
        (cache.path / f"run-{number}").mkdir()
        misbehave(workspace.path)
        misbehave(cache.path / f"run-{number}")
        caches.publish(cache)
        workspaces.close(workspace)
        trash.throw(attempt)
        trash.empty()
        assert not attempt.exists()
        assert list(trash.folder.iterdir()) == []
    caches.evict(0)
    trash.empty()
    assert list((state / "cache/layers").iterdir()) == []


@needs_root
@pytest.mark.parametrize("new_layers", [OverlayLayers, lambda _state: CopyLayers()], ids=["overlay", "copy"])
def test_with_root(new_layers: Callable[[Path], Layers]) -> None:
    with a_state_folder() as state:
        run_steps(state, new_layers)


@needs_root
def test_without_root() -> None:
    with a_state_folder() as folder:
        state = folder / "of-nobody"
        state.mkdir()
        os.chown(state, NOBODY, NOBODY)

        assert as_nobody(partial(run_steps, state, lambda _state: CopyLayers())) == 0
