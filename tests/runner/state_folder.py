"""A state folder for tests with real mounts: enterable by every user, unmounted before it is removed."""

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runner.layers import CopyLayers, Layers, OverlayLayers
from runner.mounts import mounts_below, unmount

MODES = ("overlay", "copy")
NOBODY = 65534
ENDED_S = 60.0


@contextmanager
def a_state_folder() -> Iterator[Path]:
    """pytest's own folders are closed to other users, and git runs as another user."""
    folder = Path(tempfile.mkdtemp(prefix="bm-", dir="/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        _await_threads()
        for mount in mounts_below(folder):
            unmount(mount)
        shutil.rmtree(folder)


def _await_threads() -> None:
    """Nobody waits for git where a step was told to stop, nor for long where caches are being merged."""
    for thread in threading.enumerate():
        if thread.name.startswith(("work-", "squash")):
            thread.join(ENDED_S)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount and change users")


def layers_of(mode: str, state: Path) -> Layers:
    if mode == "overlay" and os.geteuid() != 0:
        pytest.skip("only root may mount")
    return OverlayLayers(state) if mode == "overlay" else CopyLayers()


def write_tree(root: Path, files: dict[str, str]) -> Path:
    """Files by relative path; a text that starts with `->` makes a link."""
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        place = root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("->"):
            place.symlink_to(text[2:])
        else:
            place.write_text(text)
    return root


def read_tree(root: Path) -> dict[str, str]:
    """The opposite of `write_tree`; folders that hold nothing appear with a slash."""
    seen: dict[str, str] = {}
    for folder, names, files in os.walk(root):
        here = Path(folder)
        if not names and not files and here != root:
            seen[f"{here.relative_to(root)}/"] = ""
        for name in [*names, *files]:
            place = here / name
            if place.is_symlink():
                seen[str(place.relative_to(root))] = f"->{os.readlink(place)}"
            elif place.is_file():
                seen[str(place.relative_to(root))] = place.read_text()
    return seen


def as_nobody(act: Callable[[], None]) -> int:
    """Do it in a process without rights, and return how that ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)
