"""Stacks folders on top of each other: a private writable one over shared ones that are never written.

Where the kernel lets us, the stack is an overlay that we mount ourselves; elsewhere it is a copy.
A step finds the same files either way.
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from runner.errors import BadSetup, StepError
from runner.mounts import find_mount, mount_overlay, unmount
from runner.trash import remove_tree
from runner.trees import Redirected, TreeSize, merge_layers
from shared.ids import new_id
from shared.reasons import Reason

# The kernel cuts mount options at 4,096 bytes without a word and then mounts what is left.
MAX_OPTION_BYTES = 3_800
MAX_LAYERS = 40
FORBIDDEN_IN_PATHS = ",:\\"


@contextmanager
def naming_a_full_disk() -> Iterator[None]:
    """A full disk is a reason of its own: the step can go on elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StepError(
                Reason.DISK_FULL, f"the step's folders do not fit on the disk: {error}"
            ) from error
        raise


class Layers(Protocol):
    """One way to show several folders as one."""

    mode: str

    def fits(self, target: Path, lowers: Sequence[Path], upper: Path) -> bool:
        """True when `stack` can take this many layers; otherwise some of them have to be merged first."""

    def stack(self, target: Path, lowers: Sequence[Path], upper: Path) -> None:
        """Show `upper` over `lowers` (topmost first) at `target`; a second call finds it done.

        An overlay keeps what is written in `upper`, a copy keeps it in `target`.
        """

    def unstack(self, target: Path) -> None:
        """Take the view away; harmless when there is none. What was written stays."""

    def is_stacked(self, target: Path) -> bool:
        """True when `stack` has been here."""

    def merge(self, lowers: Sequence[Path], into: Path) -> TreeSize:
        """Make the new folder `into` show what the stack `lowers` shows, as hard links to its files."""


class OverlayLayers:
    """Stacks are overlays, mounted by this process."""

    mode = "overlay"

    def __init__(self, state: Path) -> None:
        self._empty = state / "empty"
        self._empty.mkdir(mode=0o755, exist_ok=True)

    def fits(self, target: Path, lowers: Sequence[Path], upper: Path) -> bool:
        options = self._options(lowers, upper)
        return len(lowers) <= MAX_LAYERS and len(os.fsencode(options)) <= MAX_OPTION_BYTES

    @naming_a_full_disk()
    def stack(self, target: Path, lowers: Sequence[Path], upper: Path) -> None:
        if not self.fits(target, lowers, upper):
            raise StepError(Reason.INTERNAL, f"{len(lowers)} layers are too many for one mount")
        mounted = find_mount(target)
        if mounted is not None and mounted.kind == "overlay" and mounted.option("upperdir") == str(upper):
            return
        if mounted is not None:
            unmount(target)
        for folder, mode in ((upper, 0o777), (_work_folder(upper), 0o700), (target, 0o777)):
            if not folder.is_dir():
                folder.mkdir()
                folder.chmod(mode)
        mount_overlay(target, self._options(lowers, upper))
        self._check(target, max(1, len(lowers)))

    def unstack(self, target: Path) -> None:
        unmount(target)

    def is_stacked(self, target: Path) -> bool:
        return find_mount(target) is not None

    def merge(self, lowers: Sequence[Path], into: Path) -> TreeSize:
        try:
            return merge_layers(lowers, into, share=True)
        except Redirected:
            remove_tree(into)
            return self._merge_by_view(lowers, into)

    def _merge_by_view(self, lowers: Sequence[Path], into: Path) -> TreeSize:
        """Let the kernel work out renamed folders, and copy what it shows."""
        view = into.with_name(f"{into.name}.view")
        view.mkdir(exist_ok=True)
        try:
            mount_overlay(
                view, f"lowerdir={_joined([*lowers, self._empty])},redirect_dir=follow", read_only=True
            )
            return merge_layers([view], into, share=False)
        finally:
            unmount(view)
            view.rmdir()

    def _options(self, lowers: Sequence[Path], upper: Path) -> str:
        """The upper comes first, so that a cut could never make the mount read-only in silence."""
        lower = _joined(lowers or [self._empty])
        return (
            f"upperdir={upper},workdir={_work_folder(upper)},lowerdir={lower}"
            ",redirect_dir=on,index=off,metacopy=off"
        )

    def _check(self, target: Path, layers: int) -> None:
        """Trust the kernel's answer, not its silence: writable, and as many layers as asked for."""
        mounted = find_mount(target)
        seen = 0 if mounted is None else len(mounted.option("lowerdir").split(":"))
        if seen != layers or os.statvfs(target).f_flag & os.ST_RDONLY:
            unmount(target)
            raise StepError(Reason.INTERNAL, f"the mounted workspace shows {seen} of {layers} layers")


class CopyLayers:
    """Stacks are copies: slower, but they need neither root nor overlays."""

    mode = "copy"

    def fits(self, target: Path, lowers: Sequence[Path], upper: Path) -> bool:
        return True

    @naming_a_full_disk()
    def stack(self, target: Path, lowers: Sequence[Path], upper: Path) -> None:
        if target.is_dir():
            return
        part = target.with_name(f"{target.name}.part")
        remove_tree(part)
        merge_layers([*([upper] if upper.is_dir() else []), *lowers], part, share=False)
        part.chmod(0o777)
        part.rename(target)  # whoever finds the folder finds all of it

    def unstack(self, target: Path) -> None:
        return

    def is_stacked(self, target: Path) -> bool:
        return target.is_dir()

    def merge(self, lowers: Sequence[Path], into: Path) -> TreeSize:
        return merge_layers(lowers, into, share=True)


def choose_layers(state: Path) -> tuple[Layers, str]:
    """Find out by trying how this machine can stack folders, and say so in one sentence."""
    check_state_path(state)
    state.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return (
            CopyLayers(),
            "workspaces and caches are copied: the runner is not root and cannot mount overlays",
        )
    try:
        layers = OverlayLayers(state)
        _probe(layers, state)
    except (OSError, StepError) as error:
        return (
            CopyLayers(),
            f"workspaces and caches are copied: an overlay below {state} did not work ({error})",
        )
    return layers, "workspaces and caches are overlays over shared folders"


def check_state_path(state: Path) -> None:
    """Refuse a state folder whose name would be read as part of mount options."""
    if not state.is_absolute():
        raise BadSetup(f"the state folder {state} has to be an absolute path")
    if any(sign in str(state) or sign in str(state.resolve()) for sign in FORBIDDEN_IN_PATHS):
        raise BadSetup(f"the state folder {state} must not have a comma, colon or backslash in its path")


def _probe(layers: OverlayLayers, state: Path) -> None:
    """Mount a small overlay, write through it and see where the bytes went."""
    folder = state / f"probe-{new_id()}"
    lower, upper, target = folder / "lower", folder / "upper", folder / "view"
    lower.mkdir(parents=True)
    (lower / "old").write_text("lower")
    try:
        layers.stack(target, [lower], upper)
        (target / "old").write_text("upper")
        (target / "new").mkdir()
        (target / "new").rename(target / "renamed")
        if (lower / "old").read_text() != "lower" or (upper / "old").read_text() != "upper":
            raise StepError(Reason.INTERNAL, "writes do not go where they should")
    finally:
        layers.unstack(target)
        remove_tree(folder)


def _joined(folders: Sequence[Path]) -> str:
    return ":".join(str(folder) for folder in folders)


def _work_folder(upper: Path) -> Path:
    return upper.with_name(f"{upper.name}.work")
