"""Brings the files of a repository onto this machine: one mirror per repository, one checkout per commit.

Checkouts are shared by all steps and never written again: a step sees one through its own layer.
"""

import fcntl
import hashlib
import json
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from runner.credentials import Credentials
from runner.deadline import boot_s
from runner.errors import BadSetup, StepError
from runner.git import Budget, Git, GitFailed, Remote, RunAs, check_url, explain_failure
from runner.recency import RecentUse
from runner.spares import Spare
from runner.trash import Trash
from runner.trees import measure
from shared.ids import new_id
from shared.protocol import Source
from shared.reasons import Reason

log = structlog.get_logger()

DEFAULT_PROTOCOLS = frozenset({"https", "ssh"})
MAX_FILES = 500_000
MAX_PACKS = 40
MAX_BRANCH_LENGTH = 255
LOCK_PAUSE_S = 0.05
ACCESS_CHECK_S = 30.0
# What was used this recently may be about to be pinned.
UNTOUCHABLE_S = 600.0
FULL_HASHES = (40, 64)
DAMAGED = re.compile(
    r"^(?!remote:).*(bad object|is corrupt|corrupted|inflate:|index unavailable|loose object"
    r"|unable to unpack|unable to read (tree|sha1|[0-9a-f]{40})|missing (blob|tree|commit))",
    re.MULTILINE,
)
LOCKS_LEFT = (
    *("*.lock", "refs/**/*.lock", "objects/pack/tmp_*", "objects/pack/.tmp-*"),
    "objects/**/tmp_obj_*",
)

Progress = Callable[[str], None]
IsWanted = Callable[[], bool]  # whether anybody still waits for what is being made


@dataclass(frozen=True)
class Checkout:
    """The files of one commit. `name` is what pins and `prune` call it."""

    path: Path
    name: str
    commit: str


def _silent(_: str) -> None:
    return


def _always() -> bool:
    return True


class SourceCache:
    """Mirrors and checkouts below one state folder; safe to use from several threads and processes.

    What is not wanted any more ends at once, with git; a fetch that others wait for goes on for them.
    """

    def __init__(
        self,
        state: Path,
        *,
        protocols: frozenset[str] = DEFAULT_PROTOCOLS,
        run_as: RunAs | None = None,
        credentials: Credentials | None = None,
        environ: Mapping[str, str] | None = None,
        budget: Budget | None = None,
        trash: Trash | None = None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = boot_s,
    ) -> None:
        self._mirrors = state / "mirrors"
        self._checkouts = state / "checkouts"
        self._protocols = protocols
        self._budget = budget or Budget()
        self._trash = trash or Trash(state)
        self._clock = clock  # says only what was used before what
        self._recent = RecentUse(steady)
        self._records = state / "sources"
        self._waiting: Counter[str] = Counter()  # how many wait for each mirror
        self._counting = threading.Lock()
        home = state / "git"
        self._git = Git(
            home, run_as, credentials or Credentials(), environ or {}, slow_seconds=self._budget.slow_seconds
        )
        self._records.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (home, self._mirrors, self._checkouts):
            folder.mkdir(parents=True, exist_ok=True)
            self._git.let_in(folder)
        self._check_access(state)

    def resolve(self, source: Source, progress: Progress = _silent, is_wanted: IsWanted = _always) -> str:
        """The full hash of the commit that this source means now."""
        remote = check_url(source.repo_url, self._protocols)
        if source.commit and self._has_checkout(remote, source.commit):
            return source.commit  # its files are here already: nobody need be asked whether it exists
        with self._locked_mirror(remote, is_wanted) as mirror:
            if source.commit:
                return self._resolve_commit(mirror, remote, source.commit, progress)
            if source.branch:
                return self._resolve_branch(mirror, remote, source.branch, progress)
            return self._resolve_head(mirror, remote, progress)

    def checkout(
        self, source: Source, commit: str, progress: Progress = _silent, is_wanted: IsWanted = _always
    ) -> Checkout:
        """The files of `commit` in a folder of their own, made now or found."""
        remote = check_url(source.repo_url, self._protocols)
        if not _is_full_hash(commit):
            raise StepError(Reason.COMMIT_NOT_FOUND, f"{commit[:64]!r} is not the full hash of a commit")
        name = _checkout_name(remote, commit)
        self._recent.note(name)
        with self._locked_mirror(remote, is_wanted) as mirror:
            place = self._checkouts / name
            if not place.is_dir():
                self._ensure_commit(mirror, remote, commit, progress)
                self._make_checkout(mirror, remote, commit, place, progress)
            self._touch(self._records / f"{name}.json")
        return Checkout(place, name, commit)

    def name_of(self, source: Source, commit: str) -> str:
        """What the checkout of this commit is or will be called, so that it can be pinned beforehand."""
        return _checkout_name(check_url(source.repo_url, self._protocols), commit)

    def is_reachable(self, source: Source, commit: str, branch: str, is_wanted: IsWanted = _always) -> bool:
        """True when `commit` is, or comes before, the head of `branch`, as the repository says now."""
        remote = check_url(source.repo_url, self._protocols)
        if not _is_full_hash(commit) or not _is_branch_name(branch):
            return False
        with self._locked_mirror(remote, is_wanted) as mirror:
            if mirror.is_ancestor(commit, branch):
                return True
            mirror.fetch(remote, _silent)
            return mirror.is_ancestor(commit, branch)

    def is_trusted(self, source: Source, commit: str, is_wanted: IsWanted = _always) -> bool:
        """True when a step of this source may publish caches that every build of the project restores."""
        return (
            source.is_project_repository
            and bool(source.default_branch)
            and source.branch == source.default_branch
            and self.is_reachable(source, commit, source.default_branch, is_wanted)
        )

    def end_former_git(self) -> None:
        """Before anything is wanted: git of a life that was killed writes into mirrors that nobody locks."""
        self._git.end_former()

    def take_back_logins(self) -> None:
        self._git.take_back_logins()

    def prune(self, keep: Set[str], max_bytes: int) -> int:
        """Delete what was used longest ago, first checkouts, then mirrors, until the rest fits.

        Checkouts named in `keep` and all that was used in the last minutes stay. Returns the bytes that stay.
        """
        sizes = self._sizes()
        total = sum(size for _, _, size in sizes)
        for used, path, size in sorted(sizes, key=lambda item: (item[1].parent == self._mirrors, item[0])):
            if total <= max_bytes:
                break
            if path.name in keep or self._recent.is_within(path.name, UNTOUCHABLE_S):
                continue
            if self._drop(path, used):
                total -= size
                log.info("source_removed", path=str(path), bytes=size)
        return total

    def spares(self, keep: Set[str]) -> Iterator[Spare]:
        """What could go for want of room: checkouts that no attempt stands on, and mirrors."""
        for used, path, size in sorted(self._sizes(), key=lambda item: item[0]):
            is_recent = self._recent.is_within(path.name, UNTOUCHABLE_S)
            if size > 0 and path.name not in keep and not is_recent:
                kind = "checkout" if path.parent == self._checkouts else "mirror"
                yield Spare(kind, path.name, used, size, partial(self._drop, path, used))

    def _has_checkout(self, remote: Remote, commit: str) -> bool:
        if not _is_full_hash(commit):
            return False
        name = _checkout_name(remote, commit)
        self._recent.note(name)
        return (self._checkouts / name).is_dir()

    def _resolve_commit(self, mirror: "_Mirror", remote: Remote, wanted: str, progress: Progress) -> str:
        if _is_full_hash(wanted):
            self._ensure_commit(mirror, remote, wanted, progress)
            return wanted
        if not re.fullmatch(r"[0-9a-f]{7,63}", wanted):
            raise StepError(Reason.COMMIT_NOT_FOUND, f"{wanted[:64]!r} is not the hash of a commit")
        mirror.fetch(remote, progress)
        found = mirror.commits_that_begin_with(wanted)
        if len(found) != 1:
            what = "no commit begins" if not found else f"{len(found)} commits begin"
            raise StepError(Reason.COMMIT_NOT_FOUND, f"in {remote.url} {what} with {wanted}")
        return found[0]

    def _resolve_branch(self, mirror: "_Mirror", remote: Remote, branch: str, progress: Progress) -> str:
        if not _is_branch_name(branch):
            raise StepError(Reason.COMMIT_NOT_FOUND, f"{branch[:255]!r} is not the name of a branch")
        mirror.fetch(remote, progress)
        found = mirror.head_of(branch)
        if not found:
            raise StepError(Reason.COMMIT_NOT_FOUND, f"{remote.url} has no branch {branch!r}")
        return found

    def _resolve_head(self, mirror: "_Mirror", remote: Remote, progress: Progress) -> str:
        commit = mirror.remote_head(remote)
        if not commit:
            raise StepError(Reason.COMMIT_NOT_FOUND, f"{remote.url} has no default branch")
        self._ensure_commit(mirror, remote, commit, progress)
        return commit

    def _ensure_commit(self, mirror: "_Mirror", remote: Remote, commit: str, progress: Progress) -> None:
        """Have exactly this commit in the mirror, by asking for it by name where no branch leads to it."""
        if mirror.has_commit(commit):
            return
        mirror.fetch(remote, progress)
        if not mirror.has_commit(commit):
            mirror.fetch_commit(remote, commit, progress)
        if not mirror.has_commit(commit) and mirror.is_damaged:
            mirror.discard()
            mirror.fetch(remote, progress)
        if not mirror.has_commit(commit):
            raise StepError(Reason.COMMIT_NOT_FOUND, f"{remote.url} has no commit {commit}")

    def _make_checkout(
        self, mirror: "_Mirror", remote: Remote, commit: str, place: Path, progress: Progress
    ) -> None:
        """Write all files aside and show them when they are complete."""
        files, size = mirror.weigh(commit)
        progress(f"checking out {commit[:12]}: {files} files, {size // 1024} KiB")
        part = self._checkouts / f".part-{new_id()}"
        part.mkdir()
        self._git.own(part)
        try:
            part.chmod(0o777)
            mirror.clone_into(part, remote, commit)
            record = {"url": remote.url, "commit": commit, "bytes": measure(part).bytes}
            (self._records / f"{place.name}.json").write_text(json.dumps(record))
            part.rename(place)
        finally:
            self._trash.throw(part)

    @contextmanager
    def _locked_mirror(self, remote: Remote, is_wanted: IsWanted) -> Iterator["_Mirror"]:
        """One worker at a time per repository, in this process and in any other."""
        deadline = time.monotonic() + self._budget.seconds
        place = self._mirrors / _digest(remote.url)[:16]
        lock = self._open_lock(place)
        try:
            with self._counted_as_waiting(place):
                while not _try_lock(lock):
                    if not is_wanted():
                        raise StepError(Reason.CANCELLED, f"nobody waits for {remote.url} any more")
                    if time.monotonic() >= deadline:
                        raise StepError(
                            Reason.INTERNAL, f"another step has been fetching {remote.url} for too long"
                        )
                    time.sleep(LOCK_PAUSE_S)
            self._touch(lock)
            self._recent.note(place.name)
            yield _Mirror(
                place,
                self._git,
                self._trash,
                self._budget,
                deadline,
                is_wanted,
                others_wait=lambda: self._waiting[place.name] > 0,
            )
        finally:
            os.close(lock)

    @contextmanager
    def _counted_as_waiting(self, mirror: Path) -> Iterator[None]:
        with self._counting:
            self._waiting[mirror.name] += 1
        try:
            yield
        finally:
            with self._counting:
                self._waiting[mirror.name] -= 1

    def _check_access(self, state: Path) -> None:
        """Try git as the user it will run as, so that a wrong setup is said at start and not in a build."""
        deadline = time.monotonic() + ACCESS_CHECK_S
        try:
            self._git.run(["-C", str(self._mirrors), "--version"], folder=Path("/"), deadline=deadline)
        except FileNotFoundError as error:
            raise BadSetup("git is not installed: run `apt-get install git`") from error
        except GitFailed as error:
            if "Permission denied" in error.text:
                raise BadSetup(_closed_folder(state, self._git.run_as)) from error
            raise BadSetup(f"git does not work: {error.text}") from error

    def _sizes(self) -> list[tuple[float, Path, int]]:
        found: list[tuple[float, Path, int]] = []
        for record in self._records.glob("*.json"):
            found.append((record.stat().st_mtime, self._checkouts / record.stem, _recorded_bytes(record)))
        for lock in self._records.glob("*.lock"):
            mirror = self._mirrors / lock.stem
            if mirror.is_dir():
                found.append((lock.stat().st_mtime, mirror, _size_of(mirror)))
        return found

    def _open_lock(self, mirror: Path) -> int:
        place = self._records / f"{mirror.name}.lock"
        return os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _drop(self, path: Path, used: float) -> bool:
        """Delete it, unless it is in use or was used since we looked: under the lock that its users take."""
        is_checkout = path.parent == self._checkouts
        mirror = self._mirror_of(path) if is_checkout else path
        if mirror is None:
            return self._throw_unless_used(path, used)
        lock = self._open_lock(mirror)
        try:
            return _try_lock(lock) and self._throw_unless_used(path, used)
        finally:
            os.close(lock)

    def _throw_unless_used(self, path: Path, used: float) -> bool:
        is_checkout = path.parent == self._checkouts
        record = self._records / f"{path.name}.{'json' if is_checkout else 'lock'}"
        with self._recent.unless_within(path.name, UNTOUCHABLE_S) as is_free:
            if not is_free:
                return False
            with suppress(FileNotFoundError):
                if record.stat().st_mtime != used:
                    return False
            self._trash.throw(path)
            if is_checkout:
                record.unlink(missing_ok=True)
        return True

    def _mirror_of(self, checkout: Path) -> Path | None:
        """The mirror that a checkout was made from, as its record says; None where that is damaged."""
        try:
            url = json.loads((self._records / f"{checkout.name}.json").read_text())["url"]
        except (ValueError, KeyError, TypeError, FileNotFoundError):
            return None
        return self._mirrors / _digest(str(url))[:16]

    def _touch(self, path: Path | int) -> None:
        now = self._clock()
        os.utime(path, (now, now))


class _Mirror:
    """One bare repository, while this thread alone may use it."""

    def __init__(
        self,
        path: Path,
        git: Git,
        trash: Trash,
        budget: Budget,
        deadline: float,
        is_wanted: IsWanted,
        *,
        others_wait: Callable[[], bool],
    ) -> None:
        self.path = path
        self.git = git
        self.trash = trash
        self.budget = budget
        self.deadline = deadline
        self.is_wanted = is_wanted
        self.others_wait = others_wait
        self.is_damaged = False

    def discard(self) -> None:
        """Forget all objects; the next fetch brings them anew."""
        log.warning("a damaged mirror is thrown away", mirror=self.path.name)
        self.trash.throw(self.path)
        self.is_damaged = False

    def fetch(self, remote: Remote, progress: Progress) -> None:
        """Bring branches and tags up to date; a damaged mirror is made anew once."""
        progress(f"fetching {remote.url}")
        try:
            self._fetch(remote, progress)
        except GitFailed as failure:
            if "mismatched algorithms" in failure.text:
                self._make_anew("sha256")
            elif _is_about_damage(failure):
                self.discard()
            else:
                raise explain_failure(failure, f"cannot fetch {remote.url}") from failure
            self._fetch_again(remote, progress)
        self._tidy()

    def fetch_commit(self, remote: Remote, commit: str, progress: Progress) -> None:
        """Ask for one commit that no branch or tag leads to; many servers allow it."""
        try:
            self._fetch(remote, progress, f"+{commit}:refs/buildmill/{commit}")
        except GitFailed as failure:
            if _is_about_damage(failure):
                self.is_damaged = True
                return
            raise StepError(Reason.COMMIT_NOT_FOUND, f"{remote.url} has no commit {commit}") from failure

    def remote_head(self, remote: Remote) -> str:
        """The commit that the remote's HEAD names, or nothing."""
        self._prepare()
        with self.git.access(remote) as extra:
            try:
                answer = self._run("ls-remote", "--end-of-options", remote.url, "HEAD", extra=extra)
            except GitFailed as failure:
                raise explain_failure(failure, f"cannot read {remote.url}") from failure
        heads = [line.split("\t") for line in answer.splitlines()]
        return next((parts[0] for parts in heads if len(parts) == 2 and parts[1] == "HEAD"), "")

    def has_commit(self, commit: str) -> bool:
        """True when exactly this object is here and is a commit (and not a tag that points at one)."""
        return self.path.is_dir() and self._ask("cat-file", "-t", commit).strip() == "commit"

    def head_of(self, branch: str) -> str:
        """The commit of a branch; a tag of the same name does not count."""
        found = self._ask(
            "rev-parse", "--verify", "--quiet", "--end-of-options", f"refs/heads/{branch}"
        ).strip()
        return found if _is_full_hash(found) and self.has_commit(found) else ""

    def commits_that_begin_with(self, prefix: str) -> list[str]:
        """Looks at objects, never at names: a branch may be called like a hash."""
        found = self._ask("rev-parse", f"--disambiguate={prefix}").split()
        return [name for name in found[:100] if self.has_commit(name)]

    def is_ancestor(self, commit: str, branch: str) -> bool:
        head = self.head_of(branch) if self.path.is_dir() else ""
        if not head or not self.has_commit(commit):
            return False
        try:
            self._run("merge-base", "--is-ancestor", "--end-of-options", commit, head)
        except GitFailed as failure:
            if failure.code == 1:
                return False
            raise explain_failure(failure, "cannot compare commits") from failure
        return True

    def weigh(self, commit: str) -> tuple[int, int]:
        """How many files a commit has and how large they are, before a single one is written."""
        try:
            listing = self._run("ls-tree", "-r", "-l", "--full-tree", "--end-of-options", commit)
        except GitFailed as failure:
            raise explain_failure(failure, "cannot list the commit's files") from failure
        sizes = [line.split(None, 4)[3] for line in listing.splitlines()]
        total = sum(int(size) for size in sizes if size.isdigit())
        if len(sizes) > MAX_FILES or total > self.budget.bytes:
            raise StepError(
                Reason.DISK_LIMIT,
                f"the commit has {len(sizes)} files with {total} bytes; "
                f"this runner accepts {MAX_FILES} files and {self.budget.bytes} bytes",
            )
        return len(sizes), total

    def clone_into(self, folder: Path, remote: Remote, commit: str) -> None:
        """Make `folder` a repository of its own at `commit`; its objects are hard links to ours."""
        local = {"GIT_ALLOW_PROTOCOL": "file"}  # for our own mirror, which git reaches by its path
        try:
            self._run(
                *("clone", "--quiet", "--local", "--no-checkout", "--template=", "--no-recurse-submodules"),
                *("--end-of-options", str(self.path), str(folder)),
                extra=local,
            )
            within = ("-C", str(folder))
            self._run(*within, "remote", "set-url", "--", "origin", remote.url)
            if (self.path / "shallow").exists():
                self._run(
                    *within, "fetch", "--quiet", "--update-shallow", str(self.path), commit, extra=local
                )
            self._run(*within, "checkout", "--quiet", "--force", "--detach", commit, watched=folder)
            seen = self._run(*within, "rev-parse", "--verify", "HEAD^{commit}").strip()
        except GitFailed as failure:
            if _is_about_damage(failure):
                self.discard()  # the next attempt finds a mirror made anew
                raise StepError(Reason.INTERNAL, "the mirror was damaged and is made anew") from failure
            raise explain_failure(failure, f"cannot check out {commit}") from failure
        if seen != commit:
            raise StepError(Reason.INTERNAL, f"the checkout holds {seen} instead of {commit}")

    def _fetch(self, remote: Remote, progress: Progress, *refspecs: str) -> None:
        self._prepare()
        with self.git.access(remote) as extra:
            self._run(
                *("fetch", "--progress", "--prune" if not refspecs else "--no-prune", "--no-tags", "--force"),
                *("--no-write-fetch-head", "--no-recurse-submodules", "--update-shallow", "--end-of-options"),
                remote.url,
                *(refspecs or ("+refs/heads/*:refs/heads/*", "+refs/tags/*:refs/tags/*")),
                extra=extra,
                progress=progress,
                watched=self.path,
                is_wanted=self._is_wanted_by_anybody,
            )

    def _is_wanted_by_anybody(self) -> bool:
        """Ended, a fetch loses all it has brought, and who waits for it has less time left than it had."""
        return self.is_wanted() or self.others_wait()

    def _fetch_again(self, remote: Remote, progress: Progress) -> None:
        try:
            self._fetch(remote, progress)
        except GitFailed as failure:
            raise explain_failure(failure, f"cannot fetch {remote.url}") from failure

    def _prepare(self) -> None:
        """Have a mirror, without what a killed predecessor left in the way; the lock is ours."""
        if not (self.path / "HEAD").is_file():
            self._make_anew("sha1")
        for pattern in LOCKS_LEFT:
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)

    def _make_anew(self, algorithm: str) -> None:
        self.trash.throw(self.path)
        part = self.path.with_name(f".part-{new_id()}")
        part.mkdir(mode=0o700)
        self.git.own(part)
        try:
            self._run("init", "--quiet", "--bare", "--template=", f"--object-format={algorithm}", folder=part)
            part.rename(self.path)
        except GitFailed as failure:
            raise explain_failure(failure, "cannot make a mirror") from failure
        finally:
            self.trash.throw(part)

    def _tidy(self) -> None:
        """Every fetch leaves a pack; many packs make everything slow."""
        if sum(1 for _ in self.path.glob("objects/pack/*.pack")) <= MAX_PACKS:
            return
        try:
            self._run("repack", "-a", "-d", "-k", "-q")
        except GitFailed as failure:
            log.warning("a mirror could not be repacked", mirror=self.path.name, cause=failure.text[-500:])

    def _ask(self, *arguments: str) -> str:
        """A question whose failure means no, as far as the mirror is whole."""
        try:
            return self._run(*arguments)
        except GitFailed as failure:
            self.is_damaged = self.is_damaged or _is_about_damage(failure)
            return ""

    def _run(
        self,
        *arguments: str,
        folder: Path | None = None,
        extra: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        watched: Path | None = None,
        is_wanted: IsWanted | None = None,
    ) -> str:
        return self.git.run(
            arguments,
            folder=folder or self.path,
            deadline=self.deadline,
            extra=extra,
            progress=progress,
            watch=None if watched is None else lambda: self._check_size(watched),
            is_wanted=is_wanted or self.is_wanted,
        )

    def _check_size(self, folder: Path) -> None:
        if _size_of(folder) > self.budget.bytes:
            raise StepError(Reason.DISK_LIMIT, f"the repository takes more than {self.budget.bytes} bytes")


def _is_about_damage(failure: GitFailed) -> bool:
    return DAMAGED.search(failure.text) is not None


def _is_full_hash(text: str) -> bool:
    return len(text) in FULL_HASHES and re.fullmatch(r"[0-9a-f]+", text) is not None


def _is_branch_name(name: str) -> bool:
    """git's own rules for names of branches, without the abbreviations that git would expand."""
    if not name or len(name) > MAX_BRANCH_LENGTH or name == "@" or name.startswith("-"):
        return False
    if re.search(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//", name):
        return False
    parts = name.split("/")
    return all(part and not part.startswith(".") and not part.endswith((".lock", ".")) for part in parts)


def _checkout_name(remote: Remote, commit: str) -> str:
    return _digest(remote.url, commit, _boot_id())[:20]


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _boot_id() -> str:
    """Checkouts are not synced to the disk, so one made before the machine last started is not believed."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _size_of(folder: Path) -> int:
    """The bytes below a folder; files that come and go while we look do not matter."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def _recorded_bytes(record: Path) -> int:
    try:
        return int(json.loads(record.read_text())["bytes"])
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return 0


def _try_lock(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _closed_folder(state: Path, run_as: RunAs | None) -> str:
    name = run_as.name if run_as is not None else "this user"
    chain = [state, *state.parents]
    closed = next((folder for folder in reversed(chain) if not folder.stat().st_mode & 0o001), state)
    return (
        f"user {name}, whom git runs as, cannot enter {closed}: "
        f"run `chmod o+x {closed}` or choose another folder with --state"
    )
