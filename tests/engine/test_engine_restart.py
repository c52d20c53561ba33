"""What becomes of steps when their engine goes away: a second engine, in a network of its own, is killed."""

import contextlib
import gc
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from runner.errors import EngineUnavailable
from runner.executor.docker import DockerExecutor, open_docker
from shared.reasons import Reason
from tests.runner.jobs import a_job, begin, log_of, run

pytestmark = [
    pytest.mark.engine,
    # The engine's client leaves the socket of a refused connection to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

IMAGE = "buildmill/busybox:1"


class SecondEngine:
    """An engine that may be killed: nothing of it is shared with the machine's own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self._options = options
        self.url = f"unix://{folder}/engine.sock"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        (self.folder / "engine.pid").unlink(missing_ok=True)
        argv = ["unshare", "--net", "dockerd", "--host", self.url, "--data-root", f"{self.folder}/data"]
        argv += [
            "--exec-root",
            f"{self.folder}/exec",
            "--pidfile",
            f"{self.folder}/engine.pid",
            *self._options,
        ]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + 60
        while not self.answers():
            assert time.monotonic() < until and self.process.poll() is None, (
                self.folder / "log"
            ).read_text()[-3000:]
            time.sleep(0.1)

    def answers(self) -> bool:
        if not (self.folder / "engine.sock").exists():
            return False
        with contextlib.suppress(Exception):
            api = docker.APIClient(self.url, version="1.40", timeout=5)
            with contextlib.closing(api):
                return bool(api.ping())
        return False

    def end(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(timeout=60)
        self._end_containerd()

    def _end_containerd(self) -> None:
        """A killed engine's own helper may live a moment longer, and the next engine would lean on it."""
        for record in self.folder.glob("exec/containerd/*.pid"):
            with contextlib.suppress(ProcessLookupError, ValueError, FileNotFoundError):
                pid = int(record.read_text())
                handle = os.pidfd_open(pid)
                with os.fdopen(handle, "rb", closefd=True):
                    os.kill(pid, signal.SIGKILL)
                    select.select([handle], [], [], 20)
            record.unlink(missing_ok=True)

    def load(self, image: str) -> None:
        first, second = docker.APIClient(version="auto"), docker.APIClient(self.url, version="auto")
        with contextlib.closing(first), contextlib.closing(second):
            second.load_image(b"".join(first.get_image(image)))

    def _end_shims(self) -> None:
        """What a killed engine has lost sight of; the folder in their command names them as ours."""
        parents = {pid: (words, parent) for pid, words, parent in _processes()}
        shims = {pid for pid, (words, _) in parents.items() if f"{self.folder}/".encode() in words}
        for pid in [pid for pid, (_, parent) in parents.items() if parent in shims] + sorted(shims):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.end(signal.SIGTERM)
        self._end_containerd()
        self._end_shims()
        mounted = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
        for path in sorted((path for path in mounted if path.startswith(f"{self.folder}/")), reverse=True):
            subprocess.run(["umount", "-l", path], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)


def _processes() -> Iterator[tuple[int, bytes, int]]:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                yield int(entry.name), (entry / "cmdline").read_bytes(), int(stat[1])


@pytest.fixture
def options() -> tuple[str, ...]:
    """What the engine is started with."""
    return ()


@pytest.fixture
def second(options: tuple[str, ...]) -> Iterator[SecondEngine]:
    folder = Path(tempfile.mkdtemp(prefix="bm-", dir="/tmp"))  # short: a socket's path has a limit
    engine = SecondEngine(folder, *options)
    try:
        engine.start()
        engine.load(IMAGE)
        yield engine
    finally:
        engine.close()
        gc.collect()  # now, where the warning about such sockets is expected


@pytest.fixture
def executor(second: SecondEngine, tmp_path: Path) -> Iterator[DockerExecutor]:
    environ = {"DOCKER_HOST": second.url}
    made = open_docker(
        runner="test-restart", state=tmp_path / "state", environ=environ, egress_rules=False, holders_ahead=1
    )
    yield made
    with contextlib.suppress(EngineUnavailable):
        for leftover in made.leftovers():
            made.remove_leftover(leftover)
    made.close()


def wait_through_outages(executor: DockerExecutor, job):
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            ended = executor.wait(job, timeout_s=5)
        except EngineUnavailable:
            time.sleep(0.1)
            continue
        if ended is not None:
            return ended
    raise AssertionError("the step did not end")


@pytest.mark.threat("E16")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_restarted_engine_is_blamed_for_the_steps_it_terminated(second, executor, tmp_path, number) -> None:
    job = begin(executor, a_job(tmp_path, "echo on; sleep 1000", runner="test-restart"))
    until = time.monotonic() + 30
    while "on" not in log_of(job):
        assert time.monotonic() < until
        time.sleep(0.01)

    second.end(number)
    second.start()
    ended = wait_through_outages(executor, job)

    assert ended.reason is Reason.DAEMON_ERROR
    after = run(executor, a_job(tmp_path, "exit 5", runner="test-restart"))
    assert (after.rc, after.code, after.reason) == (5, 5, None)


@pytest.mark.threat("E16")
def test_a_runner_that_was_away_too_still_tells(second, executor, tmp_path) -> None:
    job = begin(executor, a_job(tmp_path, "sleep 1000", runner="test-restart"))
    executor.close()
    second.end(signal.SIGKILL)
    second.start()

    heir = open_docker(
        runner="test-restart",
        state=tmp_path / "state",
        environ={"DOCKER_HOST": second.url},
        egress_rules=False,
        holders_ahead=0,
    )
    try:
        ended = wait_through_outages(heir, job)
        heir.destroy(job)
    finally:
        heir.close()

    assert ended.reason is Reason.DAEMON_ERROR


@pytest.mark.parametrize("options", [("--live-restore",)])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_step_goes_on_while_an_engine_that_keeps_its_containers_is_replaced(
    second, executor, tmp_path, number
) -> None:
    script = "echo on; while ! test -e go; do sleep 0.05; done; echo over; exit 7"
    job = begin(executor, a_job(tmp_path, script, runner="test-restart"))
    until = time.monotonic() + 30
    while "on" not in log_of(job):
        assert time.monotonic() < until
        time.sleep(0.01)

    second.end(number)
    (job.workspace / "go").touch()  # it ends while no engine is there to see it
    while "over" not in log_of(job):
        assert time.monotonic() < until
        time.sleep(0.01)
    second.start()
    ended = wait_through_outages(executor, job)

    assert (ended.rc, ended.reason) == (7, None)
    assert log_of(job) == "on\nover\n"


@pytest.mark.parametrize("options", [("--live-restore",)])
def test_a_step_that_outlives_the_replaced_engine_ends_as_it_does(second, executor, tmp_path) -> None:
    job = begin(executor, a_job(tmp_path, "while ! test -e go; do sleep 0.05; done", runner="test-restart"))

    second.end(signal.SIGKILL)
    second.start()
    assert executor.wait(job, timeout_s=0.2) is None
    (job.workspace / "go").touch()
    ended = wait_through_outages(executor, job)

    assert (ended.rc, ended.code, ended.reason) == (0, 0, None)


def begin_and_see(executor: DockerExecutor, tmp_path: Path, script: str):
    """A step that says `on`, looked at once while the engine is there."""
    job = begin(executor, a_job(tmp_path, f"echo on; {script}", runner="test-restart"))
    until = time.monotonic() + 30
    while "on" not in log_of(job):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert executor.wait(job, timeout_s=0.1) is None
    return job


@pytest.mark.threat("E16")
@pytest.mark.parametrize("options", [("--live-restore",)])
@pytest.mark.parametrize("hard", [False, True])
def test_a_step_is_watched_and_ended_without_its_engine(second, executor, tmp_path, hard) -> None:
    script = "trap 'echo bye; exit 3' TERM; while :; do sleep 0.05; done"
    job = begin_and_see(executor, tmp_path, script)
    second.end(signal.SIGKILL)

    goes_on = executor.wait(job, timeout_s=0.5)
    executor.kill(job, hard=hard)
    ended = executor.wait(job, timeout_s=20)
    ended = ended or executor.wait(job, timeout_s=0.5)

    assert goes_on is None
    assert ended is not None
    assert (ended.rc, ended.code) == ((None, None) if hard else (3, None))
    assert ("bye" in log_of(job)) is not hard


@pytest.mark.threat("E16")
@pytest.mark.parametrize("options", [("--live-restore",)])
def test_a_step_that_ended_without_its_engine_is_left_to_what_the_engine_says(
    second, executor, tmp_path
) -> None:
    job = begin_and_see(executor, tmp_path, "while ! test -e go; do sleep 0.05; done; exit 7")
    second.end(signal.SIGKILL)

    (job.workspace / "go").touch()
    with pytest.raises(EngineUnavailable):
        while executor.wait(job, timeout_s=20) is None:
            continue
    second.start()
    ended = wait_through_outages(executor, job)

    assert (ended.rc, ended.reason) == (7, None)
