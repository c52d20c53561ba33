import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import docker
import pytest

from runner.errors import BadSetup, ImageGone, StepError
from runner.executor.base import Bind
from runner.executor.docker import open_docker
from shared.reasons import Reason
from tests.runner.jobs import a_job, begin, log_of, run

pytestmark = pytest.mark.engine


@pytest.fixture
def job(runner, tmp_path):
    """Makes jobs of this test's runner."""
    return lambda script, **wishes: a_job(tmp_path, script, runner=runner, **wishes)


@pytest.fixture
def engine():
    api = docker.APIClient(version="auto")
    yield api
    api.close()


def wait_for_log(job, text: str) -> None:
    until = time.monotonic() + 30
    while text not in log_of(job):
        assert time.monotonic() < until, log_of(job)
        time.sleep(0.01)


def containers_of(engine, runner: str, role: str) -> list[str]:
    labels = [f"buildmill.runner={runner}", f"buildmill.role={role}"]
    return [found["Id"] for found in engine.containers(all=True, filters={"label": labels})]


def test_a_script_runs_in_the_workspace_and_every_line_is_kept(executor, job) -> None:
    script = (
        'pwd; echo first; echo second >/dev/stderr; echo "$WORD" | tee /dev/stderr; echo out >file; exit 7'
    )
    attempt = job(script, env={"WORD": "hello"})

    ended = run(executor, attempt)

    assert (ended.rc, ended.code, ended.reason) == (7, 7, None)
    assert log_of(attempt) == "/workspace\nfirst\nsecond\nhello\nhello\n"
    assert (attempt.workspace / "file").read_text() == "out\n"


@pytest.mark.parametrize("network", ["bridge", "none"])
def test_both_networks_have_their_own_loopback(executor, job, network) -> None:
    attempt = job("cat /sys/class/net/lo/flags; ls /sys/class/net", network=network)

    assert run(executor, attempt).succeeded
    assert ("eth0" in log_of(attempt)) == (network == "bridge")


def test_a_network_that_does_not_exist_is_the_user_error(executor, job) -> None:
    with pytest.raises(StepError) as caught:
        executor.create(job("true", network="host"))

    assert caught.value.reason is Reason.BAD_CONFIG


def test_folders_are_bound_and_read_only_ones_cannot_be_written(executor, job, tmp_path) -> None:
    cache, fixed = tmp_path / "cache", tmp_path / "fixed"
    cache.mkdir()
    fixed.mkdir()
    binds = (Bind(cache, "/root/.cache/x"), Bind(fixed, "/fixed", read_only=True))

    ended = run(executor, job("echo kept >/root/.cache/x/file; echo no >/fixed/file || exit 3", binds=binds))

    assert ended.rc == 3
    assert (cache / "file").read_text() == "kept\n"


def test_the_user_of_the_image_can_write_log_and_workspace(executor, job) -> None:
    attempt = job("echo hi; touch file; id -u", user="image")

    assert run(executor, attempt).succeeded
    assert (attempt.workspace / "file").exists()


def test_creating_and_starting_again_runs_nothing_twice(executor, job) -> None:
    attempt = job("echo once")
    run(executor, attempt)

    executor.create(attempt)
    executor.start(attempt)
    ended = executor.wait(attempt, timeout_s=30)

    assert ended.succeeded
    assert log_of(attempt) == "once\n"


def test_a_name_taken_by_a_stranger_is_not_adopted(executor, engine, job) -> None:
    attempt = job("true")
    stranger = engine.create_container("buildmill/busybox:1", ["true"], name=attempt.name)["Id"]
    try:
        with pytest.raises(StepError) as caught:
            executor.create(attempt)
    finally:
        engine.remove_container(stranger, force=True)

    assert caught.value.reason is Reason.DAEMON_ERROR


def test_another_runner_process_adopts_what_runs(executor, runner, job, tmp_path) -> None:
    attempt = begin(executor, job("echo on; until [ -e go ]; do sleep 0.1; done; exit 5"))
    wait_for_log(attempt, "on")

    heir = open_docker(runner=runner, state=tmp_path / "state", environ=os.environ, holders_ahead=0)
    try:
        found = [(left.step_id, left.attempt, left.is_running) for left in heir.leftovers()]
        heir.create(attempt)
        heir.start(attempt)
        (attempt.workspace / "go").touch()
        ended = heir.wait(attempt, timeout_s=30)
    finally:
        heir.close()

    assert found == [(attempt.step_id, 1, True)]
    assert (ended.rc, ended.code) == (5, 5)
    assert log_of(attempt) == "on\n"


def test_waiting_ends_with_its_time_while_the_step_runs_on(executor, job) -> None:
    attempt = begin(executor, job("sleep 1000"))

    before = time.monotonic()
    ended = executor.wait(attempt, timeout_s=0.3)

    assert ended is None
    assert time.monotonic() - before < 5


def test_term_reaches_the_whole_group_and_the_trap_decides(executor, job) -> None:
    attempt = begin(executor, job("trap 'echo bye; exit 9' TERM; echo on; sleep 1000 & wait"))
    wait_for_log(attempt, "on")

    executor.kill(attempt, hard=False)
    ended = executor.wait(attempt, timeout_s=30)

    assert (ended.rc, ended.code, ended.reason) == (9, 9, None)
    assert "bye" in log_of(attempt)


def test_a_kill_from_outside_is_told_from_ours(executor, engine, job) -> None:
    ours, theirs = begin(executor, job("sleep 1000")), begin(executor, job("sleep 1000"))

    executor.kill(ours, hard=True)
    engine.kill(theirs.name, "SIGKILL")

    assert executor.wait(ours, timeout_s=30).reason is None
    assert executor.wait(theirs, timeout_s=30).reason is Reason.KILLED


@pytest.mark.parametrize(("signal", "told"), [("SIGTERM", (143, None)), ("SIGKILL", (None, Reason.KILLED))])
def test_a_container_started_again_from_outside_does_not_run_its_script_again(
    executor, engine, job, signal, told
) -> None:
    attempt = begin(executor, job("echo begun; sleep 3"))
    wait_for_log(attempt, "begun")

    engine.kill(attempt.name, signal)
    engine.wait(attempt.name)
    engine.start(attempt.name)
    ended = executor.wait(attempt, timeout_s=30)

    assert (ended.rc, ended.reason) == told
    assert not ended.succeeded
    assert log_of(attempt).count("begun") == 1


def test_a_container_removed_from_outside_has_vanished(executor, engine, job) -> None:
    attempt = begin(executor, job("sleep 1000"))

    engine.remove_container(attempt.name, force=True)

    assert executor.wait(attempt, timeout_s=30).reason is Reason.CONTAINER_VANISHED
    executor.destroy(attempt)  # its holder is still there


def test_a_lost_network_holder_is_replaced(executor, engine, runner, job) -> None:
    attempt = job("echo hi")
    executor.create(attempt)
    for holder in containers_of(engine, runner, "holder"):
        engine.remove_container(holder, force=True)

    executor.start(attempt)
    ended = executor.wait(attempt, timeout_s=30)

    assert ended.succeeded
    assert log_of(attempt) == "hi\n"


def test_destroying_leaves_nothing_and_may_be_repeated(executor, engine, runner, job) -> None:
    attempt = begin(executor, job("sleep 1000"))

    executor.destroy(attempt)
    executor.destroy(attempt)
    executor.close()

    assert containers_of(engine, runner, "step") == []
    assert containers_of(engine, runner, "holder") == []


def test_holders_of_a_dead_runner_are_swept_and_those_in_use_are_not(
    executor, engine, runner, job, tmp_path
) -> None:
    attempt = begin(executor, job("sleep 1000"))
    used = engine.inspect_container(attempt.name)["HostConfig"]["NetworkMode"].removeprefix("container:")

    heir = open_docker(runner=runner, state=tmp_path / "state", environ=os.environ, holders_ahead=0)
    heir.close()

    assert used in containers_of(engine, runner, "holder")
    assert executor.wait(attempt, timeout_s=0.1) is None


def test_holders_of_a_runner_that_died_here_are_swept_by_any_other(executor, engine, tmp_path) -> None:
    program = (
        "import os, pathlib, sys, runner.executor.docker as d\n"
        "e = d.open_docker(runner=sys.argv[1], state=pathlib.Path(sys.argv[2]), environ=os.environ)\n"
        "assert e._holders.wait_until_full(30); os.kill(os.getpid(), 9)\n"
    )
    dead = f"dead-{uuid.uuid4().hex[:8]}"
    assert executor._holders.wait_until_full(30)
    subprocess.run([sys.executable, "-c", program, dead, str(tmp_path / "dead")], timeout=60, check=False)
    left_behind = containers_of(engine, dead, "holder")
    of_the_living = containers_of(engine, executor._runner, "holder")

    heir = open_docker(runner="another", state=tmp_path / "state", environ=os.environ, holders_ahead=0)
    heir.close()

    assert left_behind
    assert containers_of(engine, dead, "holder") == []
    assert containers_of(engine, executor._runner, "holder") == of_the_living


def test_an_image_without_a_shell_says_so(executor, engine, job) -> None:
    image = "buildmill/holder:1"  # holds one program, which is no shell

    ended = run(executor, job("true", image=image))

    assert ended.reason is Reason.NO_SHELL


def test_an_image_that_was_removed_meanwhile_is_no_fault_of_the_users(executor, job) -> None:
    with pytest.raises(ImageGone) as caught:
        executor.create(job("true", image="localhost:1/nope:1"))

    assert caught.value.reason is Reason.DAEMON_ERROR


def test_an_image_that_goes_in_the_very_moment_of_the_creation_is_missed_in_the_same_way(
    executor, job, monkeypatch
) -> None:
    gone = {"Id": f"sha256:{'0' * 64}", "RepoDigests": []}
    monkeypatch.setattr(executor, "_find_image", lambda image: gone)

    with pytest.raises(ImageGone):
        executor.create(job("true"))


@pytest.mark.parametrize("wish", [{"memory_mb": 4}, {"cpus": 9999.0}])
def test_limits_that_the_engine_refuses_are_the_user_error(executor, job, wish) -> None:
    with pytest.raises(StepError) as caught:
        executor.create(job("true", **wish))

    assert caught.value.reason is Reason.BAD_CONFIG


def test_too_few_processes_for_the_launcher_are_the_user_error(executor, job) -> None:
    attempt = job("true", pids=2)
    executor.create(attempt)

    try:
        executor.start(attempt)
        reason = executor.wait(attempt, timeout_s=30).reason
    except StepError as error:  # some engines cannot even start it
        reason = error.reason

    assert reason in (Reason.BAD_CONFIG, Reason.DAEMON_ERROR)


def test_the_digest_pins_what_was_resolved(executor, engine, job) -> None:
    attempt = job("true")

    created = executor.create(attempt)

    assert created.image_digest.split("@")[-1].startswith("sha256:")
    assert engine.inspect_container(attempt.name)["Config"]["Image"].startswith("sha256:")


def test_no_engine_is_told_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="scripts/engine"):
        open_docker(runner="r", state=tmp_path, environ={"DOCKER_HOST": f"unix://{tmp_path}/none.sock"})


def test_starting_costs_less_than_the_engine_own_way(executor, engine, job) -> None:
    """Generous here; the benchmark measures exactly."""
    executor._holders.wait_until_full(30)
    attempt = job("true")

    begun = time.monotonic()
    executor.create(attempt)
    executor.start(attempt)
    ours = time.monotonic() - begun

    assert ours < 5


def test_an_image_cannot_make_the_shell_skip_the_script(executor, engine, job) -> None:
    """SHELLOPTS=noexec in an image makes bash read a script, run none of it and end with 0."""
    base = engine.inspect_image("buildmill/python:3")["Id"]
    source = engine.create_container(base)["Id"]
    changes = ["ENV SHELLOPTS=noexec", "ENV BASH_ENV=/tmp/evil", "ENV ENV=/tmp/evil"]
    made = engine.commit(source, changes=changes)["Id"]
    attempt = job("echo it ran; exit 7", image=made)

    try:
        ended = run(executor, attempt)
    finally:
        executor.destroy(attempt)
        engine.remove_container(source)
        engine.remove_image(made, force=True)

    assert (ended.rc, ended.code) == (7, 7)
    assert "it ran" in log_of(attempt)
