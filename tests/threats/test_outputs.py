"""What a step leaves in its workspace is collected without being believed, or refused by name."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factories import a_step
from tests.runner.state_folder import a_state_folder, needs_root
from tests.threats.stack import Stack, containers_of
from tests.trip.stage import RunnerThread, said_in, steps_of, until

EXECUTORS = pytest.mark.parametrize("executor", ["docker", "process"])
CANARY = "PWN-CANARY-OF-THIS-MACHINE"


@pytest.fixture
def canary() -> Iterator[Path]:
    """A file of this machine that no step may get at."""
    path = Path("/etc/buildmill-threat-canary")
    path.write_text(CANARY)
    yield path
    path.unlink()


def assert_no_foreign_bytes(stack: Stack, build_id: str) -> dict[str, dict[str, object]]:
    artifacts = stack.artifacts(build_id)
    for artifact in artifacts.values():
        if artifact["type"] == "file":
            assert CANARY.encode() not in stack.download(artifact), artifact
    return artifacts


@EXECUTORS
@pytest.mark.threat("C09")
def test_a_link_in_the_repository_leads_no_collector_outside(
    stack: Stack, canary: Path, executor: str
) -> None:
    repository = stack.a_repository()
    (repository.path / "out").symlink_to("/")
    (repository.path / "etc").symlink_to("/etc")
    (repository.path / "up").symlink_to("../../../../../../etc")
    repository.git("add", ".")
    repository.commit({"a.txt": "a"})

    step, log = stack.run_step(
        "ls", on=executor, outputPaths=["out/**", "etc/**", "up/*", "out/etc/*"],
        build={"repoUrl": repository.url, "branch": "main"},
    )  # fmt: skip

    assert step["status"] == "SUCCESS", log
    assert assert_no_foreign_bytes(stack, step["buildId"]) == {}
    assert b"out/** matches nothing" in log


ODD_TREE = r"""
mkdir -p out/folder out/deep && cd out
echo plain > plain.txt
ln -s /etc absolute; ln -s ../../../../../../etc up; ln -s plain.txt fine; ln -s loop loop
mkdir -p dir && ln -s /etc dir/middle
ln -s x0 x1; i=1; while [ $i -lt 45 ]; do j=$((i+1)); ln -s x$i x$j; i=$j; done
ln -s /proc/self/mem memory; ln -s /buildmill/log own-log
ln /etc/hostname hard 2>/dev/null || true
mkfifo fifo; mknod device c 1 3 2>/dev/null || true
mkdir -p "$(printf 'a\nb')"; echo x > "$(printf 'line\nbreak')"; echo x > "$(printf 'bad\377byte')"
echo 1 > "$(printf '\303\251')"; echo 2 > "$(printf 'e\314\201')"; echo 3 > A; echo 4 > a
echo s > setuid; chmod 6755 setuid; echo w > open; chmod 0777 open; chmod 1777 dir
d=deep; i=0; while [ $i -lt 30 ]; do d=$d/d; mkdir $d; i=$((i+1)); done; echo bottom > $d/f
echo "$(head -c 250 /dev/zero | tr '\0' n)" > "$(head -c 250 /dev/zero | tr '\0' n)"
"""


@EXECUTORS
@pytest.mark.threat("D03")
@pytest.mark.threat("D04")
@pytest.mark.threat("D06")
@pytest.mark.threat("D07")
@pytest.mark.threat("D11")
def test_only_plain_files_and_links_that_stay_are_handed_on(
    stack: Stack, canary: Path, executor: str
) -> None:
    begun = time.monotonic()
    step, log = stack.run_step(ODD_TREE, on=executor, outputPaths=["out/**"])

    assert step["status"] == "SUCCESS", log
    assert time.monotonic() - begun < 30
    found = assert_no_foreign_bytes(stack, step["buildId"])
    names = {path.removeprefix("out/") for path in found}
    assert {"plain.txt", "fine", "A", "a", "\u00e9", "e\u0301", "setuid", "open", "n" * 250} <= names
    assert names & {"absolute", "up", "dir/middle", "memory", "own-log", "fifo", "device"} == set()
    assert not any("\n" in name or "bad" in name for name in names)
    contents = {name: stack.download(found[f"out/{name}"]) for name in ("\u00e9", "e\u0301", "A", "a")}
    assert list(contents.values()) == [b"1\n", b"2\n", b"3\n", b"4\n"]
    assert [found["out/setuid"]["mode"], found["out/open"]["mode"]] == [0o755, 0o777]
    assert found["out/fine"]["type"] == "link"
    for word in (b"absolute", b"fifo", b"line\\nbreak", b"bad\\xff"):
        assert word in log, word


@pytest.mark.threat("D04")
@pytest.mark.threat("D11")
def test_the_next_step_gets_what_was_handed_on_and_no_more(stack: Stack, canary: Path) -> None:
    steps = [
        a_step("first", runScript=ODD_TREE, labels=["docker"], outputPaths=["out/**"]),
        a_step(
            "next", ["first"], labels=["docker"],
            runScript="cd out; ls -l setuid; cat fine A a; ls -d absolute up fifo device 2>/dev/null; true",
        ),
    ]  # fmt: skip

    build = stack.run(steps)

    said = said_in(stack.log(steps_of(build)["next"]["id"])).decode()
    assert said.startswith("-rwxr-xr-x"), said
    assert said.splitlines()[1:] == ["plain", "3", "4"]


# A cache as a hostile step leaves it: ODD_TREE has what may not be an output, this has what runs by itself.
TRAPS = r"""
cd c
for f in .bashrc .profile .env; do echo 'touch /tmp/PWN-H10' > $f; done
mkdir -p .git/hooks && printf '#!/bin/sh\ntouch /tmp/PWN-H10\n' > .git/hooks/post-checkout
chmod 755 .git/hooks/post-checkout; cp .git/hooks/post-checkout post-checkout
printf '[core]\nhooksPath = .\nfsmonitor = touch /tmp/PWN-H10\n' > .git/config
ln -s ../.git/hooks hooks
"""
LOOK = r"""
cat c/out/plain.txt; readlink c/out/absolute; readlink c/out/up
echo stays > c/out/fresh; test ! -e .git/hooks/post-checkout; git status >/dev/null 2>&1 || :
mkdir seen && mv c/out c/.git c/hooks seen
"""


@EXECUTORS
@pytest.mark.threat("H10")
def test_what_a_cache_brings_back_stays_in_its_folder_and_runs_by_itself_nowhere(
    stack: Stack, canary: Path, executor: str
) -> None:
    project, repository = stack.a_project(), stack.a_repository()
    repository.commit({"a.txt": "a"})
    where = {"project_id": project, "repoUrl": repository.url, "branch": "main"}
    common = {"labels": [executor], "cacheDirs": ["c"]}
    before = {path: path.lstat().st_mtime_ns for path in (Path("/etc"), canary)}

    made = stack.run([a_step("test", runScript=f"{TRAPS}{ODD_TREE}", **common)], **where)
    look = a_step("test", runScript=LOOK, outputPaths=["seen/**"], **common)
    found = stack.run([look], **where)

    (step,) = found["steps"]
    log = stack.log(step["id"])
    assert made["status"] == found["status"] == "SUCCESS", log.decode(errors="replace")
    assert b"cache c: restored" in log
    # links are as they were, and have led nobody anywhere
    assert said_in(log).decode().splitlines() == ["plain", "/etc", "../../../../../../etc"]
    artifacts = assert_no_foreign_bytes(stack, found["id"])
    names = {path.removeprefix("seen/") for path in artifacts}
    assert {"out/plain.txt", "out/fresh", "out/setuid"} <= names
    assert artifacts["seen/out/setuid"]["mode"] == 0o755
    assert names & {"out/absolute", "out/up", "out/fifo", "out/device"} == set()
    assert not any(name.startswith(".git") for name in names)
    assert {path: path.lstat().st_mtime_ns for path in before} == before


@EXECUTORS
@pytest.mark.threat("D05")
def test_a_path_that_changes_all_the_time_shows_nothing_foreign(
    stack: Stack, canary: Path, executor: str
) -> None:
    script = f"""
mkdir -p out; echo mine > real
( while :; do ln -sf {canary} out/f; ln -f real out/f; done ) >/dev/null 2>&1 &
( while :; do ln -sfn /etc out/d; rm -rf out/d; mkdir out/d; done ) >/dev/null 2>&1 &
sleep 0.5
"""
    for _ in range(3):
        step, log = stack.run_step(script, on=executor, outputPaths=["out/**"])

        assert step["status"] == "SUCCESS", log
        found = assert_no_foreign_bytes(stack, step["buildId"])
        assert set(found) <= {"out/f", "out/d"}


@EXECUTORS
@pytest.mark.threat("D08")
def test_a_file_of_terabytes_is_refused_by_what_it_says_it_is(stack: Stack, executor: str) -> None:
    begun = time.monotonic()

    step, log = stack.run_step(
        "mkdir out; truncate -s 9000000000000 out/sparse", on=executor, outputPaths=["out/**"]
    )

    assert (step["status"], step["reason"], step["exitCode"]) == ("FAILED", "disk_limit", 0), log
    assert time.monotonic() - begun < 20
    assert stack.artifacts(step["buildId"]) == {}


@pytest.mark.threat("D09")
def test_more_files_than_may_be_are_refused_with_little_memory(stack: Stack) -> None:
    runner = stack.runners["docker"]
    runner.forget_peak()
    script = "mkdir out; cd out; seq 1 60000 | xargs touch"

    step, log = stack.run_step(script, outputPaths=["out/**"])

    assert (step["status"], step["reason"]) == ("FAILED", "disk_limit"), log
    assert b"20000 files" in log
    assert runner.peak_bytes < 200 * 1024 * 1024


@EXECUTORS
@pytest.mark.threat("D10")
def test_a_file_that_its_writer_never_lets_go_is_still_whole(stack: Stack, executor: str) -> None:
    script = "mkdir out; ( while :; do echo xxxxxxxxxxxxxxxx >> out/f; done ) >/dev/null 2>&1 & sleep 0.3"

    step, log = stack.run_step(script, on=executor, outputPaths=["out/f"])

    assert step["status"] == "SUCCESS", log
    found = stack.artifacts(step["buildId"])["out/f"]
    assert len(stack.download(found)) == found["size"] > 0


@EXECUTORS
@pytest.mark.threat("D12")
def test_what_a_step_locks_away_is_in_nobodys_way(stack: Stack, executor: str) -> None:
    script = (
        "mkdir -p shut/in out; echo x > shut/in/f; echo y > out/f; chmod 000 out/f shut/in/f shut/in shut"
    )

    step, log = stack.run_step(script, on=executor, outputPaths=["out/f"], cacheDirs=["kept"])
    later, next_log = stack.run_step("ls -a", on=executor)

    assert (step["status"], later["status"]) == ("SUCCESS", "SUCCESS"), log + next_log
    assert said_in(next_log).split() == [b".", b".."]
    until(lambda: containers_of(step["id"]) == [], 20)


@EXECUTORS
@pytest.mark.threat("D21")
@pytest.mark.parametrize(
    ("script", "reason", "code"),
    [
        ("true", "output_missing", 0),
        ("ln -s /etc/hostname out.txt", "output_missing", 0),
        ("mkfifo out.txt", "output_missing", 0),
        ("exit 4", "exit_nonzero", 4),
    ],
)
def test_a_missing_output_fails_the_step_and_leaves_its_code(
    stack: Stack, executor: str, script: str, reason: str, code: int
) -> None:
    step, log = stack.run_step(script, on=executor, outputPaths=["out.txt"])

    assert (step["status"], step["reason"], step["exitCode"]) == ("FAILED", reason, code), log


@pytest.mark.threat("D21")
def test_a_folder_where_a_file_was_expected_is_handed_on_as_a_folder(stack: Stack) -> None:
    step, _ = stack.run_step("mkdir out.txt; echo x > out.txt/inside", outputPaths=["out.txt"])

    assert step["status"] == "SUCCESS"
    assert list(stack.artifacts(step["buildId"])) == ["out.txt/inside"]


# A full disk


@pytest.fixture
def small_runner(stack: Stack) -> Iterator[RunnerThread]:
    """A runner with its state on a disk of 24 MiB; steps are exclusive, so that they fail only once."""
    with a_state_folder() as folder:
        state = folder / "state"
        state.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=24m,mode=755", "small", str(state)], check=True, timeout=30
        )
        runner = RunnerThread(stack.address, state, name="small", labels="small", slots=1)
        try:
            yield runner
        finally:
            runner.close()


@needs_root
@pytest.mark.threat("D22")
@pytest.mark.threat("F03")
def test_a_full_disk_never_makes_a_success_without_its_outputs(
    stack: Stack, small_runner: RunnerThread
) -> None:
    fill = "mkdir -p out; head -c 15000000 /dev/urandom > out/big"

    step, log = stack.run_step(fill, on="small", outputPaths=["out/**"], exclusive=True)

    assert (step["status"], step["reason"]) == ("FAILED", "disk_full"), log
    assert stack.artifacts(step["buildId"]) == {}
    assert_goes_on(stack)


@needs_root
@pytest.mark.threat("D22")
@pytest.mark.threat("F03")
def test_a_step_that_fills_the_disk_fails_and_the_next_one_has_room(
    stack: Stack, small_runner: RunnerThread
) -> None:
    step, log = stack.run_step("cat /dev/zero > filling", on="small", exclusive=True)

    assert step["status"] == "FAILED", log
    assert_goes_on(stack)


@needs_root
@pytest.mark.threat("D22")
def test_a_log_that_fills_the_disk_does_not_stop_the_runner(stack: Stack, small_runner: RunnerThread) -> None:
    step, _ = stack.run_step("head -c 60000000 /dev/urandom | base64; exit 5", on="small", exclusive=True)

    assert step["status"] == "FAILED"
    assert_goes_on(stack)


@needs_root
@pytest.mark.threat("D22")
def test_a_log_says_that_what_was_printed_onto_a_full_disk_is_missing(
    stack: Stack, small_runner: RunnerThread
) -> None:
    fill = "echo begin; head -c 30000000 /dev/zero > filling || true"
    talk = "head -c 1000000 /dev/zero | tr '\\0' x"

    step, log = stack.run_step(f"{fill}; {talk}; rm filling; exit 5", on="small", exclusive=True)

    assert b"begin" in log
    assert log.count(b"x" * 100) < 10_000, "the disk was not full"
    assert step["attempts"][-1]["logState"] == "gap", (step["reason"], log[-300:])
    assert b"[buildmill] error: bytes are missing here" in log.splitlines()[-1], log[-300:]
    assert_goes_on(stack)


@needs_root
@pytest.mark.threat("D22")
@pytest.mark.parametrize("spare", [0, 4096, 8192])
def test_a_disk_that_is_full_from_outside_is_waited_for(
    stack: Stack, small_runner: RunnerThread, spare: int
) -> None:
    filler = small_runner.state / "filler"
    with pytest.raises(OSError, match="No space"), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    os.truncate(filler, filler.stat().st_size - spare)
    build = stack.submit([a_step(labels=["small"], runScript="echo x > f", outputPaths=["f"])])
    time.sleep(3)  # long enough to try
    middle = stack.api.build(build["id"])["status"]

    filler.unlink()
    ended = stack.await_end(build["id"])

    assert middle != "SUCCESS"
    found = stack.artifacts(build["id"])
    assert (ended["status"] == "SUCCESS") == (list(found) == ["f"]), stack.tell(build["id"])
    assert_goes_on(stack)


def assert_goes_on(stack: Stack) -> None:
    """The room comes back a moment later: what was thrown away is deleted in the background."""
    begun = time.monotonic()
    later, log = stack.run_step("echo well > f", on="small", outputPaths=["f"])
    while later["status"] != "SUCCESS" and time.monotonic() - begun < 20:
        later, log = stack.run_step("echo well > f", on="small", outputPaths=["f"])

    assert later["status"] == "SUCCESS", log[-1000:]
    assert list(stack.artifacts(later["buildId"])) == ["f"]
