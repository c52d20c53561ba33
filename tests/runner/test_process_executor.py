import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runner.executor.base import Bind
from runner.executor.process import ProcessExecutor
from shared.reasons import Reason
from tests.runner.jobs import a_job, begin, log_of, run


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[ProcessExecutor]:
    made = ProcessExecutor(runner="test-runner", state=tmp_path / "state", environ=os.environ)
    yield made
    for leftover in made.leftovers():
        made.remove_leftover(leftover)


def wait_for_log(job, text: str) -> None:
    until = time.monotonic() + 20
    while text not in log_of(job):
        assert time.monotonic() < until, log_of(job)
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_script_runs_in_its_workspace_with_its_environment(executor, tmp_path) -> None:
    job = a_job(tmp_path, 'pwd; echo "$BUILDMILL_WORKSPACE $WORD"; echo out >file', env={"WORD": "hello"})

    ended = run(executor, job)

    assert ended.succeeded
    assert log_of(job) == f"{job.workspace}\n{job.workspace} hello\n"
    assert (job.workspace / "file").read_text() == "out\n"


def test_the_runner_own_variables_stay_with_the_runner(tmp_path) -> None:
    environ = {**os.environ, "BUILDMILL_TOKEN": "secret"}
    executor = ProcessExecutor(runner="r", state=tmp_path / "state", environ=environ)
    job = a_job(tmp_path, "env")

    run(executor, job)
    executor.destroy(job)

    assert "secret" not in log_of(job)


def test_the_exit_code_of_the_script_is_the_step_own(executor, tmp_path) -> None:
    ended = run(executor, a_job(tmp_path, "exit 7"))

    assert (ended.rc, ended.code, ended.reason) == (7, 7, None)


@pytest.mark.threat("E09")
def test_daemons_die_with_the_step(executor, tmp_path) -> None:
    script = (
        "setsid nohup sleep 1000 >/dev/null 2>&1 & echo $!; (sleep 1000 >/dev/null 2>&1 & echo $!); sleep 0.2"
    )
    job = a_job(tmp_path, script)

    ended = run(executor, job)

    assert ended.succeeded
    assert not any(is_alive(int(pid)) for pid in log_of(job).split())


def test_term_reaches_the_whole_group_and_the_trap_decides(executor, tmp_path) -> None:
    job = begin(executor, a_job(tmp_path, "trap 'echo bye; exit 9' TERM; echo on; sleep 1000 & wait"))
    wait_for_log(job, "on")

    executor.kill(job, hard=False)
    ended = executor.wait(job, timeout_s=20)

    assert (ended.rc, ended.code, ended.reason) == (9, 9, None)
    assert "bye" in log_of(job)


@pytest.mark.threat("E10")
def test_a_script_that_ignores_term_dies_by_kill(executor, tmp_path) -> None:
    job = begin(executor, a_job(tmp_path, "trap '' TERM; echo on; while :; do sleep 1; done"))
    wait_for_log(job, "on")

    executor.kill(job, hard=False)
    still_running = executor.wait(job, timeout_s=0.3)
    executor.kill(job, hard=True)
    ended = executor.wait(job, timeout_s=20)

    assert still_running is None
    assert (ended.rc, ended.code, ended.reason) == (None, 137, None)


def test_a_restarted_runner_adopts_what_runs(executor, tmp_path) -> None:
    job = begin(executor, a_job(tmp_path, "echo on; sleep 0.5; exit 5"))
    wait_for_log(job, "on")

    heir = ProcessExecutor(runner="test-runner", state=tmp_path / "state", environ=os.environ)
    heir.create(job)
    heir.start(job)
    ended = heir.wait(job, timeout_s=20)

    assert (ended.rc, ended.code) == (5, 5)
    assert log_of(job) == "on\n"


def test_the_step_outlives_a_killed_runner(executor, tmp_path) -> None:
    job = a_job(tmp_path, "echo on; sleep 0.5; exit 6")
    program = (
        "import os, sys, pathlib, runner.executor.base as b, runner.executor.process as p\n"
        "state, folder, workspace, step = sys.argv[1:]\n"
        "e = p.ProcessExecutor(runner='test-runner', state=pathlib.Path(state), environ=os.environ)\n"
        "j = b.Job(runner='test-runner', step_id=step, attempt=1, build_id='build', image='i',\n"
        "          attempt_dir=pathlib.Path(folder), workspace=pathlib.Path(workspace))\n"
        "e.create(j); e.start(j); os.kill(os.getpid(), 9)\n"
    )
    paths = [str(tmp_path / "state"), str(job.attempt_dir), str(job.workspace), job.step_id]

    runner = subprocess.run([sys.executable, "-c", program, *paths], timeout=30, check=False)
    ended = executor.wait(job, timeout_s=20)

    assert runner.returncode == -signal.SIGKILL
    assert (ended.rc, ended.code) == (6, 6)


def test_a_second_start_runs_nothing_twice(executor, tmp_path) -> None:
    job = a_job(tmp_path, "echo once")
    run(executor, job)

    executor.start(job)
    executor.wait(job, timeout_s=20)

    assert log_of(job) == "once\n"


def test_a_start_on_its_way_and_the_next_runner_start_run_the_script_once(executor, tmp_path) -> None:
    """A killed runner's supervisor may come up just when the next process looks for one."""
    job = a_job(tmp_path, f"echo x >> {tmp_path}/ran; sleep 0.5")
    executor.create(job)

    with ThreadPoolExecutor(4) as pool:
        for started in [pool.submit(executor.start, job) for _ in range(4)]:
            started.result()
    ended = executor.wait(job, timeout_s=30)

    assert ended.succeeded
    assert (tmp_path / "ran").read_text() == "x\n"


def test_waiting_ends_with_its_time_while_the_step_runs_on(executor, tmp_path) -> None:
    job = begin(executor, a_job(tmp_path, "sleep 1000"))

    assert executor.wait(job, timeout_s=0.1) is None
    assert [leftover.is_running for leftover in executor.leftovers()] == [True]


def test_waiting_for_what_was_never_started_ends_with_its_time(executor, tmp_path) -> None:
    job = a_job(tmp_path, "true")
    executor.create(job)

    assert executor.wait(job, timeout_s=0.1) is None


def test_a_murdered_supervisor_is_no_success_and_leaves_nothing(executor, tmp_path) -> None:
    job = begin(executor, a_job(tmp_path, "sleep 1000 & echo pid $!; wait"))
    wait_for_log(job, "pid")
    pid = int(log_of(job).split()[1])

    os.kill(int((job.attempt_dir / "supervisor").read_text().split()[0]), signal.SIGKILL)
    ended = executor.wait(job, timeout_s=20)

    assert not ended.succeeded
    assert ended.reason is Reason.KILLED
    assert not is_alive(pid)


def test_a_dead_attempt_is_not_taken_for_another_process_with_its_number(executor, tmp_path) -> None:
    job = a_job(tmp_path, "true")
    executor.create(job)
    (job.attempt_dir / "supervisor").write_text(f"{os.getpid()} 1\n")

    executor.kill(job, hard=False)  # would end this very test
    ended = executor.wait(job, timeout_s=5)

    assert not ended.succeeded


def test_a_folder_below_the_workspace_is_shown_there_and_goes_with_the_step(executor, tmp_path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    job = a_job(tmp_path, "echo new >deep/cache/file", binds=(Bind(cache, "/workspace/deep/cache"),))

    ended = run(executor, job)
    executor.destroy(job)

    assert ended.succeeded, log_of(job)
    assert (cache / "file").read_text() == "new\n"
    assert not (job.workspace / "deep/cache/file").exists()


def test_a_link_in_a_checkout_cannot_move_a_mount(executor, tmp_path) -> None:
    victim, cache = tmp_path / "victim", tmp_path / "cache"
    victim.mkdir()
    cache.mkdir()
    job = a_job(tmp_path, "true", binds=(Bind(cache, "/workspace/link/x"),))
    (job.workspace / "link").symlink_to(victim)

    run(executor, job)

    assert "/workspace/link/x is not there" in log_of(job)
    assert list(victim.iterdir()) == []


def test_a_folder_outside_the_workspace_is_named_as_missing(executor, tmp_path) -> None:
    job = a_job(tmp_path, "true", binds=(Bind(tmp_path, "/root/.cache"),))

    ended = run(executor, job)

    assert ended.succeeded
    assert "/root/.cache is not there" in log_of(job)


def test_destroying_kills_and_may_be_repeated(executor, tmp_path) -> None:
    job = begin(executor, a_job(tmp_path, "sleep 1000 & echo pid $!; wait"))
    wait_for_log(job, "pid")

    executor.destroy(job)
    executor.destroy(job)

    assert not is_alive(int(log_of(job).split()[1]))
    assert executor.leftovers() == []


def test_a_script_that_cannot_be_entered_says_why(executor, tmp_path) -> None:
    job = a_job(tmp_path, "true")
    job.workspace.rmdir()

    ended = run(executor, job)

    assert not ended.succeeded
    assert b"cannot be started" in executor.diagnostics(job)
