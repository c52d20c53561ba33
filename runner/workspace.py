"""Puts a step's workspace together: its scratch, over the outputs of its dependencies, over the checkout.

Only the scratch is ever written. Outputs of dependencies are laid out once for every distinct set of them,
as hard links into the blob store where the mode allows it, and are then shared by all steps.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import structlog

from runner.deadline import boot_s
from runner.durable import write_whole
from runner.errors import StepError
from runner.layers import Layers, naming_a_full_disk
from runner.recency import RecentUse
from runner.trash import Trash
from runner.trees import copy_file
from shared.ids import new_id
from shared.protocol import InputFile
from shared.reasons import Reason

log = structlog.get_logger()

RECORD = "workspace.json"
OPEN_FOLDER = 0o777
MAX_INPUTS = 1_000_000
MAX_PATH_BYTES = 4_095
MAX_NAME_BYTES = 255
UNTOUCHABLE_S = 600.0

Fetch = Callable[[str], Path]
Note = Callable[[str], None]


@dataclass(frozen=True)
class Workspace:
    """One step's files at `path`, made of shared layers that stay pinned until it is closed."""

    path: Path
    upper: Path
    attempt_dir: Path
    pins: frozenset[str]


class Workspaces:
    """Builds and closes workspaces below one state folder."""

    def __init__(
        self, state: Path, layers: Layers, trash: Trash, *, clock: Callable[[], float] = boot_s
    ) -> None:
        self._inputs = state / "inputs"
        self._inputs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._inputs.chmod(0o700)
        self._layers = layers
        self._trash = trash
        self._recent = RecentUse(clock)

    def build(
        self,
        attempt_dir: Path,
        *,
        checkout: Path | None,
        inputs: Sequence[InputFile],
        fetch: Fetch,
        note: Note,
    ) -> Workspace:
        """Make the workspace of one attempt; a second call for the same attempt finds it standing.

        `fetch` gives the local, verified file of a blob; `note` takes lines for the step's log.
        """
        attempt_dir.chmod(
            0o700
        )  # what a step writes may carry setuid bits; nobody else on this machine gets in
        chosen = choose_inputs(inputs, note)
        layer = self._inputs / _manifest_digest(chosen) if chosen else None
        pins = frozenset(folder.name for folder in (layer, checkout) if folder is not None)
        self.pin(attempt_dir, pins)
        if layer is not None:
            self._lay_out(layer, chosen, fetch)
        workspace = _workspace_of(attempt_dir, pins)
        lowers = [folder for folder in (layer, checkout) if folder is not None]
        self._layers.stack(workspace.path, lowers, workspace.upper)
        return workspace

    def pin(self, attempt_dir: Path, names: Set[str]) -> None:
        """These shared layers are the attempt's from now on, whether they are there already or not."""
        record = json.dumps({"pins": sorted(names)}).encode()
        with naming_a_full_disk():
            write_whole(attempt_dir / RECORD, record, durable=False)

    def find(self, attempt_dir: Path) -> Workspace | None:
        """The workspace that a predecessor built for this attempt, if it got that far."""
        pins = _read_pins(attempt_dir)
        return None if pins is None else _workspace_of(attempt_dir, pins)

    def is_standing(self, workspace: Workspace) -> bool:
        """True when the files of the workspace can be seen at its path, as they cannot after a reboot."""
        return self._layers.is_stacked(workspace.path)

    def close(self, workspace: Workspace) -> None:
        """Take the workspace away, whatever the step left in it; harmless when it has gone."""
        self._layers.unstack(workspace.path)
        work = workspace.upper.with_name(f"{workspace.upper.name}.work")
        part = workspace.path.with_name(f"{workspace.path.name}.part")
        for folder in (workspace.path, part, workspace.upper, work):
            self._trash.throw(folder)
        (workspace.attempt_dir / RECORD).unlink(missing_ok=True)

    def pinned(self, attempt_dirs: Iterable[Path]) -> set[str]:
        """The names of all shared layers that these attempts stand on."""
        return {pin for attempt_dir in attempt_dirs for pin in _read_pins(attempt_dir) or ()}

    def prune(self, keep: Set[str]) -> None:
        """Drop the layers of inputs that no attempt in sight uses."""
        for layer in self._inputs.iterdir():
            if layer.name in keep:
                continue
            with self._recent.unless_within(layer.name, UNTOUCHABLE_S) as is_free:
                if is_free:
                    self._trash.throw(layer)

    def _lay_out(self, layer: Path, chosen: Sequence[InputFile], fetch: Fetch) -> None:
        """Have the folder that holds exactly these inputs; whoever finds it finds all of it."""
        self._recent.note(layer.name)
        if layer.is_dir():
            return
        part = self._inputs / f".part-{new_id()}"
        try:
            with naming_a_full_disk():
                part.mkdir()
                _write_inputs(part, chosen, fetch)
                part.rename(layer)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another step was faster
                raise
        finally:
            self._trash.throw(part)


def choose_inputs(inputs: Sequence[InputFile], note: Note) -> list[InputFile]:
    """What stands at each path in the end: later entries win, and every overwrite is said in one line.

    A file and a folder at one path cannot both be had; neither can a file below a link.
    """
    if len(inputs) > MAX_INPUTS:
        raise StepError(Reason.DISK_LIMIT, f"the step's dependencies deliver more than {MAX_INPUTS} files")
    chosen: dict[str, InputFile] = {}
    parents: dict[str, InputFile] = {}
    for entry in inputs:
        _check_input(entry)
        before = chosen.get(entry.path)
        if before is not None and (before.type == "directory") != (entry.type == "directory"):
            raise _conflict(entry.path, before, entry)
        if entry.type != "directory" and entry.path in parents:
            raise _conflict(entry.path, parents[entry.path], entry)
        for parent in _parents_of(entry.path):
            standing = chosen.get(parent)
            if standing is not None and standing.type != "directory":
                raise _conflict(parent, standing, entry)
            parents.setdefault(parent, entry)
        if before is not None and entry.type != "directory" and before.step != entry.step and before != entry:
            note(f"{entry.path} of step {entry.step} overwrites that of step {before.step}")
        chosen[entry.path] = entry
    return sorted(chosen.values(), key=lambda entry: entry.path.split("/"))


def refuse_hidden_inputs(inputs: Iterable[InputFile], cache_dirs: Iterable[str]) -> None:
    """A cache lies over the workspace: what other steps hand on there, the script would never see."""
    caches = {path for path in cache_dirs if not path.startswith("/")}
    within = tuple(f"{path}/" for path in caches)
    above = {parent for path in caches for parent in _parents_of(path)}
    for entry in inputs:
        is_folder = entry.type == "directory"
        if entry.path.startswith(within) or (not is_folder and (entry.path in caches or entry.path in above)):
            raise StepError(
                Reason.OUTPUT_CONFLICT,
                f"step {entry.step} delivers {entry.path}, where this step keeps a cache directory",
            )


def open_to_everybody(inputs: Iterable[InputFile]) -> list[InputFile]:
    """The same for a step that is not root, which could not change or even read what others made private.

    Whoever may execute a file or enter a folder is everybody then, as in a checkout.
    """
    return [
        entry.model_copy(update={"mode": entry.mode | (0o777 if entry.mode & 0o111 else 0o666)})
        for entry in inputs
    ]


def _conflict(path: str, first: InputFile, second: InputFile) -> StepError:
    return StepError(
        Reason.OUTPUT_CONFLICT,
        f"steps {first.step} and {second.step} deliver a file and a directory at {path}",
    )


def _check_input(entry: InputFile) -> None:
    parts = entry.path.split("/")
    encoded = entry.path.encode(errors="surrogatepass")
    is_plain = (
        all(
            part not in ("", ".", "..") and len(part.encode(errors="surrogatepass")) <= MAX_NAME_BYTES
            for part in parts
        )
        and len(encoded) <= MAX_PATH_BYTES
        and b"\0" not in encoded
    )
    if not is_plain:
        raise StepError(Reason.BAD_CONFIG, f"{entry.path[:200]!r} is no path inside the workspace")
    if entry.type == "link" and (
        not entry.target or "\0" in entry.target or len(entry.target) > MAX_PATH_BYTES
    ):
        raise StepError(Reason.BAD_CONFIG, f"the link {entry.path} has no usable target")


def _parents_of(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _write_inputs(root: Path, chosen: Sequence[InputFile], fetch: Fetch) -> None:
    """Write every entry by way of its folder's descriptor, so that no link can lead outside."""
    _make_folders(root, chosen)
    folder_name, folder = "", os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for entry in chosen:
            if entry.type == "directory":
                continue
            parent, _, name = entry.path.rpartition("/")
            if parent != folder_name:
                os.close(folder)
                folder_name, folder = parent, _open_folder(root, parent)
            if entry.type == "link":
                os.symlink(entry.target, name, dir_fd=folder)
            else:
                _place_file(fetch(entry.sha256), entry, name, folder)
    finally:
        os.close(folder)


def _make_folders(root: Path, chosen: Sequence[InputFile]) -> None:
    """Folders are open to every user of the step, as those of a checkout are."""
    wanted = {parent for entry in chosen for parent in _parents_of(entry.path)}
    wanted |= {entry.path for entry in chosen if entry.type == "directory"}
    root.chmod(OPEN_FOLDER)
    for path in sorted(wanted, key=lambda path: path.split("/")):
        parent, _, name = path.rpartition("/")
        folder = _open_folder(root, parent)
        try:
            os.mkdir(name, dir_fd=folder)
            os.chmod(name, OPEN_FOLDER, dir_fd=folder)
        finally:
            os.close(folder)


def _open_folder(root: Path, path: str) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    folder = os.open(root, flags)
    for part in filter(None, path.split("/")):
        try:
            inner = os.open(part, flags, dir_fd=folder)
        finally:
            os.close(folder)
        folder = inner
    return folder


def _place_file(blob: Path, entry: InputFile, name: str, folder: int) -> None:
    """Link the blob where its mode is the one asked for; a mode cannot differ between hard links."""
    found = blob.lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size != entry.size:
        raise StepError(Reason.INTERNAL, f"the stored content of {entry.path} is not what was recorded")
    mode = entry.mode & 0o777
    if stat.S_IMODE(found.st_mode) == mode:
        try:
            os.link(blob, name, dst_dir_fd=folder, follow_symlinks=False)
            return
        except OSError as error:
            if error.errno not in (errno.EMLINK, errno.EXDEV, errno.EPERM):
                raise
    copy_file(os.fspath(blob), f"/proc/self/fd/{folder}/{name}", mode=mode)


def _manifest_digest(chosen: Sequence[InputFile]) -> str:
    """Equal for equal inputs, whichever steps they came from; another after a restart of the machine,
    because these folders are not synced to the disk."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    rows = [[entry.path, entry.type, entry.mode, entry.sha256, entry.target] for entry in chosen]
    return hashlib.sha256(json.dumps([boot, rows]).encode()).hexdigest()[:20]


def _workspace_of(attempt_dir: Path, pins: frozenset[str]) -> Workspace:
    return Workspace(attempt_dir / "ws", attempt_dir / "upper", attempt_dir, pins)


def _read_pins(attempt_dir: Path) -> frozenset[str] | None:
    try:
        return frozenset(json.loads((attempt_dir / RECORD).read_text())["pins"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning(
            "an attempt's record of its layers is damaged", attempt=str(attempt_dir), cause=str(error)
        )
        return frozenset()
