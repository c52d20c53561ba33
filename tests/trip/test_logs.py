"""Logs are provable: each ends complete, cut at its limit with a notice, or with the gap shown."""

import hashlib
import os
import re
import time
from pathlib import Path

import httpx
import pytest

from tests.factories import ON_SQLITE, a_step
from tests.trip.stage import a_stage, said_in, until

MANY_LINES = 50_000_000
# What a runner may need at its most, however much a step prints.
MOST_MEMORY_KIB = 200 * 1024

pytestmark = ON_SQLITE


@pytest.fixture
def runner(stage):
    """A process of its own, so that its memory can be seen."""
    return stage.a_runner_process()


def peak_kib(process):
    status = Path(f"/proc/{process._child.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def digest_of_log(stage, step_id):
    """Size and digest of what the script printed, its digest as the API tells it, and the last of it."""
    whole, size, last = hashlib.sha256(), 0, b""
    with httpx.stream("GET", f"{stage.address}/api/steps/{step_id}/log", timeout=120) as answer:
        for piece in answer.iter_bytes():
            whole.update(piece)
            size += len(piece)
            last = (last + piece)[-4096:]
    return whole.hexdigest(), size, last


def assert_sealed(stage, build):
    """The coordinator has what the runner read, byte for byte, and says that it is all."""
    (step,) = build["steps"]
    told = step["attempts"][0]
    digest, size, _ = digest_of_log(stage, step["id"])
    assert (told["logState"], told["logSize"], told["logSha256"]) == ("complete", size, digest)


@pytest.mark.threat("F04")
@pytest.mark.parametrize(
    ("script", "printed", "count"),
    [
        (f"{{ yes x || :; }} | head -n {MANY_LINES}", b"x\n", MANY_LINES),
        (f"{{ yes '' || :; }} | head -n {MANY_LINES}", b"\n", MANY_LINES),
        ("head -c 100000000 /dev/zero | tr '\\0' x", b"x", 100_000_000),
    ],
    ids=["lines of one character", "empty lines", "one long line"],
)
def test_a_flood_arrives_whole_and_the_runner_stays_small(stage, runner, script, printed, count):
    build = stage.run([a_step("a", runScript=f"{script}; exit 5")], timeout_s=300)

    (step,) = build["steps"]
    assert (step["status"], step["reason"], step["exitCode"]) == ("FAILED", "exit_nonzero", 5)
    assert_sealed(stage, build)
    said = _said(stage, step["id"])
    assert len(said) == len(printed) * count
    expected = hashlib.sha256()
    for _ in range(100):
        expected.update(printed * (count // 100))
    assert hashlib.sha256(said).hexdigest() == expected.hexdigest()
    assert peak_kib(runner) < MOST_MEMORY_KIB


def _said(stage, step_id):
    """As `said_in`, for logs that no pattern should be tried on."""
    log = stage.log(step_id)
    start = log.index(b"##[buildmill:start ")
    first = log.index(b"\n", log.index(b"\n", start) + 1) + 1  # behind the mark and the echo of the command
    return log[first : log.rindex(b"##[buildmill:end ")]


@pytest.mark.threat("F04")
def test_bytes_of_every_kind_come_through(stage, runner):
    noise = (
        bytes(range(256)) * 1000 + b"\x1b[2J\x1b]8;;http://x\x07\r\0\0\xff\xfe" * 1000 + os.urandom(500_000)
    )
    (stage.folder / "noise").write_bytes(noise)

    build = stage.run([a_step("a", runScript=f"cat {stage.folder}/noise; printf 'no newline at the end'")])

    assert_sealed(stage, build)
    assert said_in(stage.log(build["steps"][0]["id"])) == noise + b"no newline at the end"


def test_lines_of_both_streams_stay_in_the_order_in_which_they_were_printed(stage, runner):
    script = "n=0; while [ $n -lt 3000 ]; do echo out $n; echo err $n >&2; n=$((n + 1)); done"

    build = stage.run([a_step("a", runScript=script)])

    expected = "".join(f"out {n}\nerr {n}\n" for n in range(3000))
    assert said_in(stage.log(build["steps"][0]["id"])) == expected.encode()


def test_a_line_now_and_then_can_be_read_within_a_second(stage, runner):
    script = "for n in 1 2 3 4 5 6 7 8 9 10 11 12; do date +%s.%N; sleep 0.4; done"
    build = stage.submit([a_step("a", runScript=script)])
    step_id = build["steps"][0]["id"]
    seen: dict[bytes, float] = {}

    def all_seen():
        now = time.time()
        for line in re.findall(rb"(?m)^\d{10}\.\d+$", stage.log(step_id)):
            seen.setdefault(line, now)
        return len(seen) == 12

    until(all_seen, 30)

    delays = sorted(when - float(line) for line, when in seen.items())
    assert delays[-1] < 1.0, delays


@pytest.mark.threat("F04")
def test_a_step_that_prints_without_end_keeps_its_exit_code_and_little_of_its_log(database):
    with a_stage(database, log_limit=65536) as stage:
        runner = stage.a_runner_process()

        build = stage.run([a_step("a", runScript="timeout 3 yes || :; exit 5")])

        (step,) = build["steps"]
        assert (step["status"], step["exitCode"]) == ("FAILED", 5)
        assert step["attempts"][0]["logState"] == "truncated"
        log = stage.log(step["id"])
        assert log.endswith(
            b"[buildmill] the log limit of 65536 bytes is reached; what follows is not kept\n"
        )
        assert len(log) < 66_000
        assert peak_kib(runner) < MOST_MEMORY_KIB


def test_a_log_that_an_operator_cut_shows_where_and_is_never_complete(stage, runner):
    go = stage.folder / "go"
    script = f"echo before; while ! test -e {go}; do sleep 0.05; done; echo behind"
    build = stage.submit([a_step("a", runScript=script)])
    step_id = build["steps"][0]["id"]
    before = stage.await_log(step_id, b"\nbefore\n")

    (path,) = (stage.folder / "r" / "a").glob("*/1/log")
    os.truncate(path, 0)
    stage.await_log(step_id, b"bytes are missing here")
    go.touch()
    build = stage.await_end(build["id"])

    (step,) = build["steps"]
    log = stage.log(step_id)
    gap = f"[buildmill] warning: bytes are missing here, behind byte {len(before)} of this log: "
    assert step["status"] == "SUCCESS"
    assert step["attempts"][0]["logState"] == "gap"
    assert log[: len(before)] == before
    assert log[len(before) :].startswith(gap.encode())
    assert b"\nbehind\n" in log


def test_a_log_that_was_cut_before_it_was_delivered_says_how_much_is_missing(stage):
    runner = stage.a_runner()
    build = stage.submit([a_step("a", runScript="echo begun; sleep 2; seq 1 1000000; sleep 2")])
    step_id = build["steps"][0]["id"]
    stage.await_log(step_id, b"begun\n")
    runner.wire.is_unplugged = True
    (path,) = (stage.folder / "r" / "a").glob("*/1/log")
    until(lambda: path.stat().st_size > 6_888_000)
    time.sleep(1.2)  # the runner looks at its size twice a second
    size = path.stat().st_size

    os.truncate(path, 0)
    runner.wire.is_unplugged = False
    build = stage.await_end(build["id"])

    (step,) = build["steps"]
    assert step["attempts"][0]["logState"] == "gap"
    found = re.search(
        rb"at least (\d+) bytes are missing here, behind byte (\d+) of this log", stage.log(step_id)
    )
    assert found is not None
    missing, behind = map(int, found.groups())
    assert missing + behind == size
