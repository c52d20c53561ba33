"""Steps as plain processes, for tests and for machines without a container engine: nothing is kept apart.

The same files carry output and exit code as in a container. A supervisor stays with each attempt, so a
restarted runner finds it by the process id and the start time written in the attempt's folder.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

import structlog

from runner.errors import BadSetup, EngineUnavailable, StepError
from runner.executor import launcher, supervisor, verdict
from runner.executor.base import Bind, Created, Ended, Job, Leftover, name_of
from runner.executor.secret_files import SecretFiles
from runner.spares import Spare
from shared.reasons import Reason

INSIDE_WORKSPACE: Final = PurePosixPath("/workspace")
SAID: Final = "launcher.log"
MARK: Final = "BUILDMILL_ATTEMPT_OF"
START_S: Final = 30
DEATH_S: Final = 60.0
POLL_S: Final = 0.05
DIAGNOSTICS_LIMIT: Final = 65536
INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "USER", "LOGNAME", "SHELL", "TERM")
_MS_BIND: Final = 4096
_MS_REC: Final = 16384
_MNT_DETACH: Final = 2

_log = structlog.get_logger(__name__)


class ProcessExecutor:
    """Runs each attempt in a session of its own. `environ` is what steps inherit of the runner's."""

    name = "process"
    isolates = False

    def __init__(
        self, *, runner: str, state: Path, environ: Mapping[str, str], former_ids: Collection[str] = ()
    ) -> None:
        if not Path("/bin/sh").exists():
            raise BadSetup("this machine has no /bin/sh; use the docker executor")
        self._runners = frozenset({runner, *former_ids})
        self._records = state / "processes"  # one per attempt that create made, so that strays are found
        self._records.mkdir(parents=True, exist_ok=True)
        self._secret_files = SecretFiles(state, runner, former_ids)
        self._inherited = {name: environ[name] for name in INHERITED if name in environ}

    def pull(self, image: str, *, deadline_s: float, progress: Callable[[str], None]) -> str:
        """There are no images here, and the step's log says so."""
        progress(f"{image} is not used: this runner runs steps without containers")
        return ""

    def make_files(self, attempt_dir: Path) -> None:
        launcher.make_attempt_files(attempt_dir, inside=str(attempt_dir))

    def create(self, job: Job) -> Created:
        files = launcher.make_attempt_files(job.attempt_dir, inside=str(job.attempt_dir))
        record = self._records / job.name
        if not record.exists():
            notes = [note for bind in job.binds if (note := _show(bind, job))]
            with files.log.open("a", encoding="utf-8") as log:
                log.writelines(f"{note}\n" for note in notes)
            made = {"step": job.step_id, "attempt": job.attempt, "folder": str(job.attempt_dir)}
            record.write_text(json.dumps(made), encoding="utf-8")
        return Created(container=job.name, image_digest="")

    def start(self, job: Job) -> None:
        if (job.attempt_dir / supervisor.RECORD).exists():
            return  # a second start would run the script a second time
        self._place_secrets(job)
        argv = [sys.executable, "-I", "-S", supervisor.__file__, str(job.attempt_dir), str(job.workspace)]
        with (job.attempt_dir / SAID).open("ab") as said:
            try:
                subprocess.run(
                    argv,
                    env=self._env(job),
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    start_new_session=True,
                    timeout=START_S,
                    check=True,
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise StepError(Reason.INTERNAL, f"the step's supervisor does not start: {error}") from error

    def has_started(self, job: Job) -> bool:
        return (job.attempt_dir / supervisor.RECORD).exists()

    def _place_secrets(self, job: Job) -> None:
        if not job.secrets:
            return
        placed = self._secret_files.place(job.name, job.secrets, for_any_user=False)
        link = job.attempt_dir / "secrets"
        link.unlink(missing_ok=True)
        link.symlink_to(placed)

    def _env(self, job: Job) -> dict[str, str]:
        ours = {"BUILDMILL_WORKSPACE": str(job.workspace), MARK: str(job.attempt_dir)}
        git = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
        return {**self._inherited, **git, **job.env, **ours}

    def wait(self, job: Job, *, timeout_s: float) -> Ended | None:
        until = time.monotonic() + timeout_s
        while True:
            if job.secrets:
                self._secret_files.remove_read(job.name)
            has_begun = (job.attempt_dir / supervisor.RECORD).exists()
            descriptor = _open_supervisor(job.attempt_dir)
            if has_begun and descriptor is None:
                return self._judge(job)
            left_s = until - time.monotonic()
            if descriptor is not None:
                _await_end(descriptor, left_s)
            elif not job.attempt_dir.exists():
                return verdict.judge_vanished(None)
            elif left_s > 0:
                time.sleep(min(POLL_S, left_s))  # not started yet
            if left_s <= 0:
                return None

    def _judge(self, job: Job) -> Ended:
        code = _read_number(job.attempt_dir / supervisor.ENDED)
        if code is None:
            _kill_marked(job.attempt_dir)  # the supervisor was murdered
        rc = launcher.read_rc(job.attempt_dir)
        said = self.diagnostics(job).decode("utf-8", "replace") if rc is None else ""
        asked = (job.attempt_dir / "asked").exists()
        return verdict.judge(verdict.Facts(rc=rc, code=code, we_asked=asked, launcher_said=said))

    def kill(self, job: Job, *, hard: bool) -> None:
        if not job.attempt_dir.exists():
            return
        (job.attempt_dir / "asked").touch()  # for a runner that takes over before the end is seen
        _kill(job.attempt_dir, hard=hard)

    def diagnostics(self, job: Job) -> bytes:
        said = job.attempt_dir / SAID
        return said.read_bytes()[-DIAGNOSTICS_LIMIT:] if said.is_file() else b""

    def destroy(self, job: Job) -> None:
        self._secret_files.remove(job.name)
        _kill(job.attempt_dir, hard=True)
        _hide_all(job.attempt_dir)
        (self._records / job.name).unlink(missing_ok=True)

    def remains(self, job: Job) -> list[str]:
        mark = f"{MARK}={job.attempt_dir}".encode()
        found = [f"process {pid}" for pid in _all_pids() if _has_mark(pid, mark)]
        found += [f"secrets of {job.name}"] if self._secret_files.stands(job.name) else []
        return found + ([f"record {job.name}"] if (self._records / job.name).exists() else [])

    def leftovers(self) -> list[Leftover]:
        found = []
        for record in sorted(self._records.iterdir()):
            made = json.loads(record.read_text(encoding="utf-8") or "{}")
            folder = Path(made.get("folder", "/nonexistent"))
            found.append(
                Leftover(
                    name=record.name,
                    step_id=made.get("step", ""),
                    attempt=made.get("attempt", 0),
                    is_running=_open_and_close(folder),
                ),
            )
        return found

    def remove_leftover(self, leftover: Leftover) -> None:
        self._secret_files.remove(leftover.name)
        record = self._records / leftover.name
        if not record.is_file():
            return
        folder = Path(json.loads(record.read_text(encoding="utf-8") or "{}").get("folder", "/nonexistent"))
        _kill(folder, hard=True)
        _hide_all(folder)
        record.unlink(missing_ok=True)

    def remove_strays(self, held: Collection[tuple[str, int]]) -> None:
        """Processes leave nothing else besides their folders."""
        self._secret_files.sweep([name_of(runner, *key) for key in held for runner in self._runners])

    def spares(self, wanted: Collection[str]) -> Iterator[Spare]:
        return iter(())

    def storage(self) -> Path | None:
        return None

    def close(self) -> None:
        """Nothing is kept ahead; attempts that run go on."""


# -- processes


def _open_supervisor(attempt_dir: Path) -> int | None:
    """A handle on the attempt's supervisor; None when it is dead, even if its id lives in another process."""
    try:
        pid, began = (attempt_dir / supervisor.RECORD).read_text(encoding="utf-8").split()
        descriptor = os.pidfd_open(int(pid))
    except (OSError, ValueError):
        return None
    try:
        if supervisor.began(int(pid)) == began and not _is_over(descriptor):
            return descriptor
    except OSError:
        pass  # it died between two looks
    os.close(descriptor)
    return None


def _is_over(descriptor: int) -> bool:
    """Whether a process has ended; nobody may have collected it yet."""
    return bool(select.select([descriptor], [], [], 0)[0])


def _open_and_close(attempt_dir: Path) -> bool:
    descriptor = _open_supervisor(attempt_dir)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


def _await_end(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        return bool(poll.poll(max(0, int(timeout_s * 1000))))
    finally:
        os.close(descriptor)


def _kill(attempt_dir: Path, *, hard: bool) -> None:
    until = time.monotonic() + DEATH_S
    while (descriptor := _open_supervisor(attempt_dir)) is not None:
        number = signal.SIGUSR1 if hard else signal.SIGTERM
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            pass  # it died between two looks
        if _await_end(descriptor, 0.2 if hard else 0) or not hard:
            break
        if time.monotonic() > until:
            raise EngineUnavailable(f"{attempt_dir} does not die although it was killed for {DEATH_S:g} s")
    if hard:
        _kill_marked(attempt_dir)


def _kill_marked(attempt_dir: Path) -> None:
    """Kill what outlived a murdered supervisor: everything that carries the attempt's mark."""
    mark = f"{MARK}={attempt_dir}".encode()
    for _ in range(100):
        marked = [pid for pid in _all_pids() if _has_mark(pid, mark)]
        for pid in marked:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not marked:
            return
        time.sleep(POLL_S)
    _log.warning("processes of an attempt stay behind", attempt=str(attempt_dir))


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _has_mark(pid: int, mark: bytes) -> bool:
    try:
        return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, or another user's
        return False


def _read_number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# -- folders that the step sees in its workspace


def _show(bind: Bind, job: Job) -> str | None:
    """Put a folder where the step expects it; a sentence for the log when that cannot be had."""
    target = PurePosixPath(bind.target)
    if not target.is_relative_to(INSIDE_WORKSPACE) or target == INSIDE_WORKSPACE or ".." in target.parts:
        return f"{bind.target} is not there: without a container only folders of the workspace can be given"
    *parents, name = target.relative_to(INSIDE_WORKSPACE).parts
    try:
        folder = _open_below(job.workspace, parents)
    except OSError as error:
        return f"{bind.target} is not there: {error.strerror}"
    try:
        if bind.source.is_dir() and _mount(bind, folder, name):
            _remember(job.attempt_dir, "mounts", str(job.workspace.joinpath(*parents, name)))
        else:
            os.symlink(bind.source, name, dir_fd=folder)
            _remember(job.attempt_dir, "links", str(job.workspace.joinpath(*parents, name)))
    except OSError as error:
        return f"{bind.target} is not there: {error.strerror}"
    finally:
        os.close(folder)
    return (
        f"{bind.target} can be written: without a container it is not protected" if bind.read_only else None
    )


def _open_below(folder: Path, names: list[str]) -> int:
    """Open a folder below another, made where missing; a link in the way is refused."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    here = os.open(folder, flags)
    for name in names:
        try:
            _make_folder(here, name)
            deeper = os.open(name, flags, dir_fd=here)
        finally:
            os.close(here)
        here = deeper
    return here


def _make_folder(parent: int, name: str) -> None:
    try:
        os.mkdir(name, dir_fd=parent)
    except FileExistsError:
        pass


def _mount(bind: Bind, parent: int, name: str) -> bool:
    """Bind-mount a folder; False where this process may not."""
    if os.geteuid() != 0:
        return False
    _make_folder(parent, name)
    target = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        where = f"/proc/self/fd/{target}".encode()
        if libc.mount(os.fsencode(bind.source), where, None, _MS_BIND | _MS_REC, None) == 0:
            return True
    finally:
        os.close(target)
    os.rmdir(name, dir_fd=parent)
    return False


def _remember(attempt_dir: Path, kind: str, path: str) -> None:
    with (attempt_dir / kind).open("a", encoding="utf-8") as file:
        file.write(f"{json.dumps(path)}\n")


def _hide_all(attempt_dir: Path) -> None:
    """Take away what `_show` gave, the last first."""
    libc = ctypes.CDLL(None, use_errno=True)
    for path in reversed(_remembered(attempt_dir, "mounts")):
        libc.umount2(os.fsencode(path), _MNT_DETACH)  # already gone is as good
    for path in reversed(_remembered(attempt_dir, "links")):
        if Path(path).is_symlink():
            Path(path).unlink()
    for kind in ("mounts", "links"):
        (attempt_dir / kind).unlink(missing_ok=True)


def _remembered(attempt_dir: Path, kind: str) -> list[str]:
    file = attempt_dir / kind
    return (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    )
