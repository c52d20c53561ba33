"""Cancels and limits in containers: what is told as gone is looked for with the engine's own eyes."""

import re
import subprocess
import time
import uuid
from pathlib import Path

import docker
import pytest

from runner.mounts import mounts_below
from tests.engine.registry import a_registry
from tests.factories import a_step
from tests.trip.stage import an_engine_stage, said_in, until
from tests.trip.test_cancels import await_receipt, cancel

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def stage():
    with an_engine_stage() as stage:
        stage.runner = stage.a_runner(executor="docker", slots=2)
        yield stage


@pytest.fixture(scope="module")
def engine():
    api = docker.APIClient(version="auto")
    yield api
    api.close()


@pytest.fixture(scope="module")
def with_volumes(stage):
    """The name of an image for which the engine makes volumes of its own."""
    slug, image = f"volumes-{uuid.uuid4().hex[:8]}", f"buildmill-test/{uuid.uuid4().hex[:8]}:1"
    dockerfile = "FROM buildmill/busybox:1\nVOLUME /data /more\n"
    subprocess.run(["docker", "build", "-q", "-t", image, "-"], input=dockerfile, text=True, check=True)
    stage.an_image(slug, image)
    yield slug
    subprocess.run(["docker", "rmi", "-f", image], check=True, stdout=subprocess.DEVNULL)


def container_of(engine, step_id):
    (found,) = engine.containers(all=True, filters={"label": f"buildmill.step={step_id}"})
    return engine.inspect_container(found["Id"])


def assert_gone(engine, stage, step_id, *, container=None, machine="r"):
    """Nothing with the step's label is there, nor what its container was seen to stand on."""
    label = {"label": f"buildmill.step={step_id}"}
    assert engine.containers(all=True, filters=label) == []
    assert engine.networks(filters=label) == []
    assert not engine.volumes(filters=label)["Volumes"]
    folder = stage.folder / machine / "a" / step_id
    assert mounts_below(folder) == []
    assert {path.name for path in folder.glob("*/*")} <= {"journal.json"}  # until the answer is heard
    if container is not None:
        volumes = {one["Name"] for one in engine.volumes()["Volumes"] or []}
        assert volumes.isdisjoint(one["Name"] for one in container["Mounts"] if one["Type"] == "volume")
        holder = container["HostConfig"]["NetworkMode"].removeprefix("container:")
        assert holder not in {one["Id"] for one in engine.containers(all=True)}
        assert not Path(f"/proc/{container['State']['Pid']}").exists()


@pytest.mark.threat("I16")
def test_after_the_receipt_no_container_network_volume_or_mount_is_left(stage, engine, with_volumes):
    repository = stage.a_repository()
    repository.commit({"file": "content"})
    script = "echo x > /data/x; echo y > made; mkdir -p c; (setsid sleep 600 &); echo begun; sleep 600"
    spec = [a_step("a", runScript=script, imageSlug=with_volumes, cacheDirs=["c"], graceSeconds=2)]
    build = stage.submit(spec, repoUrl=repository.url, branch="main")
    step_id = build["steps"][0]["id"]
    stage.await_log(step_id, b"begun")
    container = container_of(engine, step_id)
    assert len([one for one in container["Mounts"] if one["Type"] == "volume"]) == 2

    receipt = await_receipt(stage, cancel(stage, build["id"]))

    assert_gone(engine, stage, step_id, container=container)
    (step,) = receipt["steps"]
    assert step["requestedAt"] <= step["termAt"] <= step["deadAt"] <= step["cleanedAt"]
    assert step["leftovers"] == []


@pytest.mark.parametrize(("grace_s", "is_saved"), [(5, True), (1, False)])
def test_a_step_that_needs_three_seconds_to_end_has_them_if_it_says_so(stage, grace_s, is_saved):
    script = "trap 'sleep 3; echo saved; exit 9' TERM; echo begun; while :; do sleep 0.1; done"
    build = stage.submit([a_step("a", runScript=script, graceSeconds=grace_s)])
    step_id = build["steps"][0]["id"]
    stage.await_log(step_id, b"begun")
    began = time.monotonic()

    receipt = await_receipt(stage, cancel(stage, build["id"]))
    took_s = time.monotonic() - began

    assert receipt["confirmed"]
    assert (b"\nsaved\n" in stage.log(step_id)) == is_saved
    assert 3 <= took_s < 9 if is_saved else 1 <= took_s < 7


def test_a_step_that_falls_silent_is_ended_in_its_container(stage, engine):
    build = stage.run([a_step("a", runScript="echo begun; sleep 600", noOutputSeconds=2, graceSeconds=1)])

    (step,) = build["steps"]
    assert (step["status"], step["reason"], step["attempt"]) == ("FAILED", "no_output", 1)
    assert b"nothing was printed for 2 s" in stage.log(step["id"])
    until(lambda: engine.containers(all=True, filters={"label": f"buildmill.step={step['id']}"}) == [], 10)


@pytest.mark.threat("F11")
def test_an_image_that_only_trickles_ends_its_step_when_the_time_is_over(stage):
    with a_registry() as (registry, host):
        slug = f"trickle-{uuid.uuid4().hex[:8]}"
        stage.an_image(slug, f"{host}/trickle/image:1")
        began = time.monotonic()

        build = stage.run([a_step("a", imageSlug=slug, pullTimeoutSeconds=2)])
        took_s = time.monotonic() - began
        was_trickling = registry.trickling.is_set()

    (step,) = build["steps"]
    assert was_trickling
    assert (step["status"], step["reason"], step["attempt"]) == ("FAILED", "pull_timeout", 1)
    assert 2 <= took_s < 8


@pytest.mark.threat("F11")
@pytest.mark.threat("I16")
def test_a_cancel_during_the_pull_is_heard_at_once(stage, engine):
    with a_registry() as (registry, host):
        slug = f"trickle-{uuid.uuid4().hex[:8]}"
        stage.an_image(slug, f"{host}/trickle/image:2")
        build = stage.submit([a_step("a", imageSlug=slug)])
        assert registry.trickling.wait(20)
        began = time.monotonic()

        receipt = await_receipt(stage, cancel(stage, build["id"]), 10)

        assert time.monotonic() - began < 6
        assert registry.went_away.wait(10)  # nobody else wanted it
    assert stage.api.build(build["id"])["steps"][0]["status"] == "CANCELLED"
    assert receipt["steps"][0].get("termAt") is None
    assert_gone(engine, stage, build["steps"][0]["id"])


def test_a_runner_killed_between_term_and_the_proof_proves_it_in_its_next_life(stage, engine):
    labels = ["--labels", "mortal"]
    runner = stage.a_runner_process(*labels, machine="mortal", executor="docker")
    script = "trap 'echo dying; sleep 3; echo saved; exit 9' TERM; echo begun; while :; do sleep 0.1; done"
    build = stage.submit([a_step("a", runScript=script, labels=["mortal"])])
    step_id = build["steps"][0]["id"]
    stage.await_log(step_id, b"begun")
    container = container_of(engine, step_id)

    cancel_id = cancel(stage, build["id"])
    (log,) = (stage.folder / "mortal" / "a" / step_id).glob("1/log")
    until(lambda: b"\ndying\n" in log.read_bytes(), 15)
    runner.kill()
    successor = stage.a_runner_process(*labels, machine="mortal", executor="docker")
    receipt = await_receipt(stage, cancel_id)

    assert b"\nsaved\n" in stage.log(step_id)
    assert_gone(engine, stage, step_id, container=container, machine="mortal")
    assert receipt["steps"][0]["leftovers"] == []
    successor.close()


@pytest.mark.threat("F04")
def test_five_million_lines_of_one_character_leave_a_container_whole(stage):
    build = stage.run([a_step("a", runScript="{ yes x || :; } | head -n 5000000; exit 5")], timeout_s=120)

    (step,) = build["steps"]
    log = stage.log(step["id"])
    start = log.index(b"\n", log.index(b"\n", log.index(b"##[buildmill:start ")) + 1) + 1
    said = log[start : log.rindex(b"##[buildmill:end ")]
    assert (step["exitCode"], step["attempts"][0]["logState"]) == (5, "complete")
    assert said == b"x\n" * 5_000_000


def test_what_a_container_prints_is_seen_within_a_second_and_in_order(stage):
    script = "for n in 1 2 3 4 5 6 7 8; do date +%s.$n; echo err $n >&2; sleep 0.4; done; printf end"
    build = stage.submit([a_step("a", runScript=script)])
    step_id = build["steps"][0]["id"]
    seen: dict[bytes, float] = {}

    def all_seen():
        now = time.time()
        for line in re.findall(rb"(?m)^(\d{10}\.\d)$", stage.log(step_id)):
            seen.setdefault(line, now)
        return len(seen) == 8

    until(all_seen, 30)
    build = stage.await_end(build["id"])

    # the date of a second that is nearly over looks a second older than it is
    assert max(when - int(line.split(b".")[0]) for line, when in seen.items()) < 2.0
    said = re.sub(rb"\d{10}", b"out", said_in(stage.log(step_id)))
    assert said == b"".join(b"out.%d\nerr %d\n" % (n, n) for n in range(1, 9)) + b"end"
