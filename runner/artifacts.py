"""Collects what a step hands on. The only file that walks trees a step has written.

Every process of the step is dead when this runs, and still nothing in the tree is believed: names are
looked up below the workspace's own descriptor, what is opened is looked at before it is read, and the
bytes that are hashed are the bytes that are kept.
"""

import errno
import os
import posixpath
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from runner.beneath import open_content, open_folder
from runner.errors import StepError
from shared.protocol import ArtifactEntry
from shared.reasons import Reason
from shared.references import InvalidReference, refuse_unshowable
from shared.step_paths import could_contain, is_pattern, matches, output_pattern

DEEPEST = 200
LONGEST_PATH = 4095
MOST_WARNINGS = 50
MOST_SEEN = 2_000_000
# What opening may answer when something stands there that is not ours to follow or to read.
LEFT_ALONE = {
    errno.ELOOP: "is or lies behind a symbolic link",
    errno.EXDEV: "lies on another file system",
    errno.ENOENT: "vanished while it was collected",
    errno.ENOTDIR: "changed while it was collected",
    errno.EAGAIN: "changed while it was collected",
    errno.EINVAL: "changed while it was collected",  # a link is one no longer
    errno.ENXIO: "is no regular file",
    errno.ENODEV: "is no regular file",
    errno.EACCES: "cannot be read by the runner",
    errno.EPERM: "cannot be read by the runner",
    errno.ENAMETOOLONG: "has too long a name",
}


class Store(Protocol):
    """Keeps the content of an open file and returns its digest and size."""

    def __call__(self, fd: int, *, max_bytes: int) -> tuple[str, int]: ...


@dataclass(frozen=True)
class Collected:
    """What was found; `missing` are the literal paths that name nothing."""

    entries: tuple[ArtifactEntry, ...]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(entry.size for entry in self.entries)


def collect(
    workspace: Path, patterns: Sequence[str], *, max_files: int = 20_000, max_bytes: int, store: Store
) -> Collected:
    """Keep what `patterns` name in the workspace; refuse too much before any of it is read."""
    wanted = _canonical(patterns)
    root = os.open(workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        walk = _Walk(root, wanted, max_files, max_bytes)
        if wanted:
            walk.enter("", wanted)
        entries = walk.keep(store)
    finally:
        os.close(root)
    for pattern in wanted:
        if is_pattern(pattern) and pattern not in walk.matched:
            walk.warnings.add(pattern, "matches nothing")
    standing = {place for entry in entries for place in _with_parents(entry.path)}
    missing = tuple(path for path in wanted if not is_pattern(path) and path not in standing)
    _warn_of_twins(entries, walk.warnings)
    return Collected(tuple(entries), missing, walk.warnings.lines())


@dataclass(frozen=True)
class _Found:
    """Something that is to be handed on, as the walk saw it."""

    path: str
    kind: str
    mode: int
    size: int = 0
    target: str = ""


@dataclass
class _Warnings:
    """The first warnings word for word, the rest as a number."""

    kept: list[str] = field(default_factory=list)
    dropped: int = 0

    def add(self, path: str, what: str) -> None:
        if len(self.kept) < MOST_WARNINGS:
            self.kept.append(f"{escaped(path)} {what}")
        else:
            self.dropped += 1

    def lines(self) -> tuple[str, ...]:
        more = (f"{self.dropped} more warnings about outputs",) if self.dropped else ()
        return (*self.kept, *more)


class _Walk:
    """One look through the workspace: what to keep, how much it is, and what cannot be kept."""

    def __init__(self, root: int, patterns: Sequence[str], max_files: int, max_bytes: int) -> None:
        self.warnings = _Warnings()
        self.matched: set[str] = set()  # the patterns with wildcards that took something
        self._root = root
        self._literals = {pattern for pattern in patterns if not is_pattern(pattern)}
        self._max_files = max_files
        self._max_bytes = max_bytes
        self._found: list[_Found] = []
        self._bytes = 0
        self._seen = 0

    def enter(self, folder: str, patterns: Sequence[str]) -> bool | None:
        """Look through one folder and return whether anything in it is handed on, None if it is closed."""
        if folder.count("/") >= DEEPEST:
            self.warnings.add(
                folder[:100] + "...", f"is not entered: it lies more than {DEEPEST} folders deep"
            )
            return None
        try:
            fd = open_folder(self._root, folder or ".")
            try:
                return self._look_through(fd, folder, patterns)
            finally:
                os.close(fd)
        except OSError as error:
            self._leave_alone(folder, error)
            return None

    def keep(self, store: Store) -> list[ArtifactEntry]:
        """Store the files found and return all entries, sorted by the bytes of their paths."""
        left = self._max_bytes
        entries = []
        for found in sorted(self._found, key=lambda found: found.path.encode()):
            if found.kind == "link":
                entry = ArtifactEntry(path=found.path, type="link", mode=0o777, target=found.target)
            elif found.kind == "directory":
                entry = ArtifactEntry(path=found.path, type="directory", mode=found.mode)
            else:
                kept = self._keep_file(found, store, left)
                if kept is None:
                    continue
                entry = kept
                left -= entry.size
            entries.append(entry)
        return entries

    def _look_through(self, fd: int, folder: str, patterns: Sequence[str]) -> bool:
        before = len(self._found)
        folders: list[str] = []
        with os.scandir(fd) as listing:
            for entry in listing:
                self._count_one_more()
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif self._takes(path, patterns):
                    self._take(fd, entry, folder, path)
        # Folders come after the listing is closed, so that depth costs one descriptor per level.
        for name in sorted(folders):
            self._meet_folder(fd, name, folder, patterns)
        return len(self._found) > before

    def _meet_folder(self, fd: int, name: str, parent: str, patterns: Sequence[str]) -> None:
        path = f"{parent}/{name}" if parent else name
        if name == ".git" and not parent:
            return  # patterns never reach the workspace's own
        inside = [pattern for pattern in patterns if could_contain(pattern, path)]
        is_taken = self._takes(path, patterns)
        if not (inside or is_taken) or not self._is_nameable(path):
            return
        if name == ".git":
            self.warnings.add(path, "is never handed on")
            return
        is_full = self.enter(path, inside) if inside else self._holds_anything(path)
        if is_full and not inside:
            self.warnings.add(path, "is a folder with content that no pattern takes; name it with /** behind")
        if is_taken and is_full is False:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                self._add(_Found(path, "directory", status.st_mode & 0o777))

    def _holds_anything(self, path: str) -> bool | None:
        try:
            fd = open_folder(self._root, path)
        except OSError as error:
            self._leave_alone(path, error)
            return None
        try:
            with os.scandir(fd) as listing:
                return next(listing, None) is not None
        finally:
            os.close(fd)

    def _takes(self, path: str, patterns: Sequence[str]) -> bool:
        """Tell whether a pattern takes `path`, and remember which did."""
        is_taken = False
        for pattern in patterns:
            is_news = pattern not in self._literals and pattern not in self.matched
            if (is_news or not is_taken) and matches(pattern, path):
                is_taken = True
                if is_news:
                    self.matched.add(pattern)
        return is_taken

    def _take(self, fd: int, entry: "os.DirEntry[str]", folder: str, path: str) -> None:
        if not self._is_nameable(path):
            return
        if entry.name == ".git":  # a work tree's pointer to a repository elsewhere
            self.warnings.add(path, "is never handed on")
            return
        try:
            status = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                self._take_link(path, os.readlink(entry.name, dir_fd=fd), folder)
            elif stat.S_ISREG(status.st_mode):
                self._take_file(path, status)
            else:
                self.warnings.add(path, "is no regular file and is left out")
        except OSError as error:
            self._leave_alone(path, error)

    def _take_file(self, path: str, status: os.stat_result) -> None:
        self._bytes += status.st_size
        if self._bytes > self._max_bytes:
            raise StepError(
                Reason.DISK_LIMIT,
                f"the outputs exceed the limit of {self._max_bytes} bytes (at {escaped(path)})",
            )
        self._add(_Found(path, "file", status.st_mode & 0o777, status.st_size))

    def _take_link(self, path: str, target: str, folder: str) -> None:
        if not _stays_inside(target, folder):
            self.warnings.add(
                path, f"points out of the workspace, to {escaped(target[:200])}, and is left out"
            )
        elif not _is_text(target):
            self.warnings.add(
                path, f"points to {escaped(target[:200])}, which is no legal name; it is left out"
            )
        else:
            self._add(_Found(path, "link", 0o777, target=target))
            if path in self._literals:
                self.warnings.add(path, "is a link: it is handed on as such, without what it points to")

    def _add(self, found: _Found) -> None:
        if len(self._found) >= self._max_files:
            raise StepError(Reason.DISK_LIMIT, f"the outputs are more than {self._max_files} files")
        self._found.append(found)

    def _keep_file(self, found: _Found, store: Store, left: int) -> ArtifactEntry | None:
        try:
            fd = open_content(self._root, found.path)
        except OSError as error:
            self._leave_alone(found.path, error)
            return None
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                self.warnings.add(found.path, "is no regular file and is left out")
                return None
            sha256, size = store(fd, max_bytes=left)
        finally:
            os.close(fd)
        return ArtifactEntry(
            path=found.path, type="file", mode=status.st_mode & 0o777, size=size, sha256=sha256
        )

    def _count_one_more(self) -> None:
        self._seen += 1
        if self._seen > MOST_SEEN:
            raise StepError(
                Reason.DISK_LIMIT,
                f"more than {MOST_SEEN} files stand where outputs may be: name the outputs more narrowly",
            )

    def _is_nameable(self, path: str) -> bool:
        if not _is_text(path):
            self.warnings.add(path, "has a name that is no showable text and is left out")
            return False
        if len(path.encode()) > LONGEST_PATH:
            self.warnings.add(path[:100] + "...", f"is longer than {LONGEST_PATH} bytes and is left out")
            return False
        return True

    def _leave_alone(self, path: str, error: OSError) -> None:
        why = LEFT_ALONE.get(error.errno or 0)
        if why is None:
            raise StepError(Reason.INTERNAL, f"{escaped(path)} cannot be read: {error.strerror}") from error
        self.warnings.add(path, f"{why} and is left out")


def escaped(text: str) -> str:
    """One showable line, whatever the name held."""
    return "".join(letter if _is_text(letter) else _escape(letter) for letter in text)


def _escape(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"  # a byte that is no UTF-8
    return letter.encode("unicode_escape").decode()


def _canonical(patterns: Sequence[str]) -> list[str]:
    try:
        return list(dict.fromkeys(output_pattern(pattern) for pattern in patterns))
    except InvalidReference as error:
        raise StepError(Reason.BAD_CONFIG, error.reason) from error


def _is_text(name: str) -> bool:
    try:
        refuse_unshowable("a name", name)
        name.encode()
    except (InvalidReference, UnicodeEncodeError):
        return False
    return True


def _stays_inside(target: str, folder: str) -> bool:
    """Tell whether a link in `folder` can only lead into the workspace.

    `..` counts only before the first name: behind a name that is a link it would lead elsewhere.
    """
    if not target or target.startswith("/") or len(target.encode(errors="surrogateescape")) > LONGEST_PATH:
        return False
    up = 0
    names = [name for name in target.split("/") if name not in ("", ".")]
    while up < len(names) and names[up] == "..":
        up += 1
    depth = len(folder.split("/")) if folder else 0
    return up <= depth and ".." not in names[up:]


def _with_parents(path: str) -> Iterator[str]:
    while path:
        yield path
        path = posixpath.dirname(path)


def _warn_of_twins(entries: Sequence[ArtifactEntry], warnings: _Warnings) -> None:
    """Names that some file systems take for one and the same are kept apart here, and pointed out."""
    seen: dict[str, str] = {}
    for entry in entries:
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", entry.path).casefold())
        if folded in seen:
            warnings.add(entry.path, f"and {seen[folded]} are one name on some systems")
        seen[folded] = entry.path
