"""Whole builds in containers: what a step is given, what it may use, and what it leaves behind."""

import hashlib
import io
import subprocess
import tarfile
import time
import uuid
from pathlib import Path

import docker
import pytest

from tests.engine.registry import a_registry
from tests.factories import a_step
from tests.trip.stage import an_engine_stage, said_in, steps_of, until

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def stage():
    with an_engine_stage() as stage:
        stage.runner = stage.a_runner(executor="docker", slots=2)
        yield stage


@pytest.fixture
def built_image():
    """Makes images out of files; they are gone after the test."""
    engine = docker.APIClient(version="auto")
    made = []

    def make(*changes, **files):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for name, content in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        name = f"buildmill-test/{uuid.uuid4().hex[:8]}"
        engine.import_image_from_data(stream.getvalue(), repository=name, tag="1", changes=list(changes))
        made.append(f"{name}:1")
        return f"{name}:1"

    yield make
    for name in made:
        engine.remove_image(name, force=True)
    engine.close()


def only_step(build):
    (step,) = build["steps"]
    return step


def run_one(stage, script, **fields):
    """A build of one step; the step and its whole log."""
    build = stage.run([a_step("a", runScript=script, **fields)])
    step = only_step(build)
    return step, stage.log(step["id"])


def test_a_checkout_outputs_and_caches_meet_in_one_workspace(stage):
    repository = stage.a_repository()
    repository.commit({"src/main.txt": "from git\n", "keep": "kept\n", "cache/readme": "x\n"})
    spec = [
        a_step(
            "a",
            runScript="pwd; cat src/main.txt; echo a > src/made; echo changed > keep; rm src/main.txt; "
            "cat warm/* /root/abs/* 2>/dev/null || echo cold; date > warm/a; date > /root/abs/b",
            outputPaths=["src/made"],
            cacheDirs=["warm", "/root/abs"],
        ),
        a_step(
            "b",
            ["a"],
            imageSlug="py",
            runScript="cat src/made src/main.txt keep; git log --format=%s; git status --porcelain; "
            "test ! -e warm",
        ),
    ]
    workflow = stage.api.a_workflow(spec)
    request = {"repoUrl": repository.url, "branch": "main"}

    first = stage.await_end(stage.build_again(workflow, **request)["id"])
    second = stage.await_end(stage.build_again(workflow, **request)["id"])

    said = [{n: said_in(stage.log(s["id"])) for n, s in steps_of(build).items()} for build in (first, second)]
    assert first["status"] == second["status"] == "SUCCESS", stage.tell(second["id"])
    assert said[0]["a"] == b"/workspace\nfrom git\ncold\n"
    assert said[1]["a"].startswith(b"/workspace\nfrom git\n")
    assert b"cold" not in said[1]["a"]
    assert said[0]["b"] == b"a\nfrom git\nkept\nchange\n?? src/made\n"


@pytest.mark.parametrize(("name", "reason"), [("missing", "image_not_found"), ("denied", "image_denied")])
def test_an_image_that_is_not_to_be_had_fails_the_step_at_once(stage, name, reason):
    with a_registry() as (_, host):
        stage.an_image(name, f"{host}/{name}/image:1")
        build = stage.run([a_step("a", imageSlug=name), a_step("b", ["a"])])

    steps = steps_of(build)
    assert (steps["a"]["reason"], steps["a"]["attempt"]) == (reason, 1), stage.tell(build["id"])
    assert (steps["a"]["status"], steps["b"]["status"]) == ("FAILED", "SKIPPED")
    assert f"{host}/{name}/image".encode() in stage.log(steps["a"]["id"])


def test_an_image_without_a_shell_says_so(stage, built_image):
    slug = f"bare-{uuid.uuid4().hex[:8]}"
    stage.an_image(slug, built_image(hello=b"hello"))

    step, log = run_one(stage, "echo never", imageSlug=slug)

    assert (step["status"], step["reason"]) == ("FAILED", "no_shell"), log


def test_a_step_may_run_as_the_user_of_its_image(stage):
    slug, image = f"user-{uuid.uuid4().hex[:8]}", f"buildmill-test/{uuid.uuid4().hex[:8]}:1"
    dockerfile = "FROM buildmill/busybox:1\nUSER 1000\n"
    subprocess.run(["docker", "build", "-q", "-t", image, "-"], input=dockerfile, text=True, check=True)
    try:
        stage.an_image(slug, image)
        script = "id -u; echo x > file; mkdir -p deep/er; echo y > deep/er/z; test -w $HOME"
        own, log = run_one(stage, script, imageSlug=slug, user="image", outputPaths=["deep/er/z"])
        root, root_log = run_one(stage, "id -u", imageSlug=slug)
    finally:
        subprocess.run(["docker", "rmi", "-f", image], check=True, stdout=subprocess.DEVNULL)

    assert own["status"] == root["status"] == "SUCCESS", log
    assert said_in(log).startswith(b"1000\n")
    assert said_in(root_log) == b"0\n"


def test_a_step_without_a_network_sees_nothing_but_itself(stage):
    step, log = run_one(stage, "ls /sys/class/net; ! wget -q -T 2 -O - http://1.1.1.1/", network="none")

    assert step["status"] == "SUCCESS", log
    assert said_in(log).split(b"\n")[0] == b"lo"


def test_what_a_step_may_use_is_what_it_asked_for(stage):
    script = (
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null || true; "
        "cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/cpu.max 2>/dev/null || true; "
        "cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null || true"
    )

    step, log = run_one(stage, script, resources={"cpus": 0.5, "memoryMb": 64, "pids": 100})

    assert step["status"] == "SUCCESS", log
    assert said_in(log).split() in (
        [b"67108864", b"50000", b"100"],
        [b"67108864", b"50000", b"100000", b"100"],
    )


def test_a_step_that_needs_too_much_memory_ends_as_oom(stage):
    script = 'python -c "x = bytearray(512 * 1024 * 1024); print(len(x))"'

    step, log = run_one(stage, script, imageSlug="py", resources={"memoryMb": 64})

    assert (step["status"], step["reason"]) == ("FAILED", "oom"), log
    assert step["attempt"] == 1


def test_a_step_holds_only_the_capabilities_it_is_promised(stage):
    step, log = run_one(stage, "grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:' /proc/self/status")

    told = dict(line.split(b":\t") for line in said_in(log).splitlines())
    promised = 0
    for bit in (0, 1, 3, 5, 6, 7, 10):  # chown dac_override fowner kill setgid setuid net_bind_service
        promised |= 1 << bit
    assert step["status"] == "SUCCESS"
    assert int(told[b"CapEff"], 16) & ~promised == 0
    assert int(told[b"CapBnd"], 16) & ~promised == 0
    assert (told[b"NoNewPrivs"], told[b"Seccomp"]) == (b"1", b"2")


def test_sixty_megabytes_of_log_arrive_whole(stage):
    step, log = run_one(stage, "seq 1 8000000")

    expected = hashlib.sha256()
    for start in range(1, 8_000_001, 100_000):
        expected.update("".join(f"{number}\n" for number in range(start, start + 100_000)).encode())
    assert step["status"] == "SUCCESS", log[-2000:]
    assert len(said_in(log)) > 60_000_000
    assert hashlib.sha256(said_in(log)).hexdigest() == expected.hexdigest()


@pytest.mark.threat("D12")
@pytest.mark.threat("E11")
def test_the_next_build_finds_nothing_of_what_the_last_one_left(stage):
    repository = stage.a_repository()
    repository.commit({"file": "content\n"})
    planting = (
        "mkdir -p .git/hooks /root/bin locked; echo 'touch /tmp/PWN' | tee .git/hooks/post-checkout "
        "/root/.profile /root/.bashrc /root/bin/ls >/dev/null; chmod -R 755 .git/hooks; "
        "echo bad > file; echo x > locked/x; chmod 000 locked/x locked; echo y > /tmp/left; exit 1"
    )
    looking = (
        "cat file; ls -A; ls -A .git/hooks 2>/dev/null || true; test ! -e locked; test ! -e /tmp/left; "
        "test ! -e /tmp/PWN; test ! -e /root/.bashrc; test ! -e /root/bin; echo clean"
    )
    request = {"repoUrl": repository.url, "branch": "main"}

    bad = stage.run([a_step("a", runScript=planting)], **request)
    good = stage.run([a_step("a", runScript=looking)], **request)

    log = stage.log(only_step(good)["id"])
    assert bad["status"] == "FAILED"
    assert good["status"] == "SUCCESS", log
    assert said_in(log) == b"content\n.git\nfile\nclean\n"
    until(lambda: not list((stage.runner.state / "a").glob("*/*")), 10)


def test_an_exclusive_step_is_not_run_again_when_its_container_vanishes(stage):
    build = stage.submit([a_step("a", runScript="echo begun; sleep 600", exclusive=True)])
    step_id = only_step(build)["id"]
    stage.await_log(step_id, b"begun")

    engine = docker.APIClient(version="auto")
    try:
        (found,) = engine.containers(filters={"label": f"buildmill.step={step_id}"})
        engine.remove_container(found["Id"], force=True)
    finally:
        engine.close()
    build = stage.await_end(build["id"])

    step = only_step(build)
    assert (step["status"], step["reason"], step["attempt"]) == ("FAILED", "container_vanished", 1)


def test_a_cancelled_step_is_gone_with_all_it_started(stage):
    script = "trap '' TERM; (setsid sleep 600 &) ; sleep 600 & echo begun; wait; wait; sleep 600"
    build = stage.submit([a_step("a", runScript=script), a_step("b", ["a"])])
    step_id = steps_of(build)["a"]["id"]
    stage.await_log(step_id, b"begun")

    begun = time.monotonic()
    stage.cancel(build["id"])
    build = stage.await_end(build["id"], 30)

    assert time.monotonic() - begun < 18  # the grace is ten seconds
    assert {step["status"] for step in build["steps"]} == {"CANCELLED"}
    until(lambda: not containers_of(step_id), 10)


def containers_of(step_id: str) -> list[str]:
    engine = docker.APIClient(version="auto")
    try:
        found = engine.containers(all=True, filters={"label": f"buildmill.step={step_id}"})
        return [one["Id"] for one in found]
    finally:
        engine.close()


def test_nothing_of_these_builds_stays_on_the_machine(stage):
    """The last of this file: the runner is idle, and so are its folders, mounts and containers."""
    step, _ = run_one(stage, "true")

    until(lambda: not containers_of(step["id"]), 10)
    until(lambda: not list((stage.runner.state / "a").glob("*/*")), 10)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert not [place for place in mounts if place.startswith(str(stage.runner.state / "a"))]
