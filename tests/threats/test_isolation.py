"""Steps that reach for the machine, for each other, or for more than their share, through the whole stack."""

import itertools
import os
import re
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.factories import a_step
from tests.runner.state_folder import a_state_folder
from tests.threats.stack import LOG_LIMIT, Stack, containers_of
from tests.trip.stage import RunnerThread, said_in, steps_of, until

MIB = 1024 * 1024
EXECUTORS = pytest.mark.parametrize("executor", ["docker", "process"])
# CHOWN DAC_OVERRIDE FOWNER KILL SETGID SETUID NET_BIND_SERVICE
ALLOWED_CAPABILITIES = {0, 1, 3, 5, 6, 7, 10}


def python(program: str) -> str:
    return f"cat >/tmp/program.py <<'PROGRAM'\n{program}\nPROGRAM\npython3 /tmp/program.py\n"


def processes_with(mark: str) -> list[str]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if mark in line and int(folder.name) != os.getpid():
                found.append(line)
    return found


def _has_gone(step_id: str) -> bool:
    """The container is removed when the completion is acknowledged, so a moment after the build's end."""
    return containers_of(step_id) == []


def seconds_of(step: dict[str, Any]) -> float:
    begun, ended = (datetime.fromisoformat(step[name]) for name in ("startedAt", "finishedAt"))
    return (ended - begun).total_seconds()


@pytest.mark.threat("E02")
@pytest.mark.threat("E04")
def test_a_step_of_a_real_runner_holds_and_sees_little(stack: Stack) -> None:
    script = "cat /proc/self/status; echo; cat /proc/mounts; ls /proc /var/run /run 2>&1 || true; env"
    step, log = stack.run_step(script)

    said = said_in(log).decode()
    assert step["status"] == "SUCCESS", said
    status = dict(re.findall(r"^(\w+):\s*(\S+)$", said, re.MULTILINE))
    held = {bit for bit in range(64) if int(status["CapEff"], 16) >> bit & 1}
    assert held <= ALLOWED_CAPABILITIES
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    targets = {line.split()[1] for line in said.splitlines() if re.match(r"^\S+ /\S* \S+ (rw|ro)", line)}
    ours = {target for target in targets if not target.startswith(("/proc", "/sys", "/dev"))}
    assert ours <= {
        "/", "/workspace", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf",
        "/sbin/docker-init", "/bin/docker-init",
        *(f"/buildmill/{name}" for name in ("launch.sh", "script.sh", "log", "rc", "pipe")),
    }  # fmt: skip
    for word in ("docker.sock", "containerd", "BUILDMILL_NONCE", "identity.json", "X-Lease"):
        assert word not in said


@pytest.mark.threat("E03")
@pytest.mark.threat("E07")
def test_two_steps_at_once_are_strangers(stack: Stack) -> None:
    server = python("""
import os, socket, time
shared = "/dev/shm/neighbour"; open(shared, "w").write("PRIVATE")
open("/workspace/private", "w").write("PRIVATE"); open("/tmp/private", "w").write("PRIVATE")
hidden = socket.socket(socket.AF_UNIX); hidden.bind("\\0buildmill-neighbour"); hidden.listen()
line = socket.create_server(("0.0.0.0", 8765)); line.settimeout(1)
print("address", socket.gethostbyname(socket.gethostname()), flush=True)
until = time.monotonic() + 12
while time.monotonic() < until:
    try:
        peer, address = line.accept(); print("VISITED", address, flush=True)
    except TimeoutError:
        pass
""")
    client = python("""
import errno, os, select, socket, time
own = socket.gethostbyname(socket.gethostname()); base = own.rsplit(".", 1)[0]
print("address", own)
for _ in range(3):  # the neighbour may begin to listen a moment later
    lines = {}
    for number in range(1, 255):
        if f"{base}.{number}" == own: continue
        line = socket.socket(); line.setblocking(False); line.connect_ex((f"{base}.{number}", 8765))
        lines[line] = number
    until = time.monotonic() + 2.5
    while time.monotonic() < until:
        for line in select.select([], list(lines), [], 0.2)[1]:
            number = lines.pop(line)
            try: print("REACHED", number, line.getpeername())
            except OSError as error: assert error.errno == errno.ENOTCONN, error
try:
    socket.socket(socket.AF_UNIX).connect("\\0buildmill-neighbour"); print("REACHED unix")
except OSError as error: print("refused", error)
for place in ("/workspace", "/tmp", "/dev/shm"): print(place, sorted(os.listdir(place)))
print("processes", [name for name in os.listdir("/proc") if name.isdigit()])
""")
    fields = {"imageSlug": "python", "labels": ["docker"]}
    build = stack.submit(
        [a_step("server", runScript=server, **fields), a_step("client", runScript=client, **fields)]
    )

    ended = stack.await_end(build["id"])
    logs = {name: said_in(stack.log(step["id"])).decode() for name, step in steps_of(ended).items()}

    assert ended["status"] == "SUCCESS", logs
    steps = steps_of(ended)
    assert steps["server"]["startedAt"] < steps["client"]["finishedAt"]  # they met
    assert steps["client"]["startedAt"] < steps["server"]["finishedAt"]
    assert "VISITED" not in logs["server"]
    assert "REACHED" not in logs["client"]
    assert "refused" in logs["client"]
    assert "private" not in logs["client"]
    assert "neighbour']" not in logs["client"]


@pytest.mark.threat("E08")
def test_a_step_reaches_no_service_of_this_machine(stack: Stack) -> None:
    probe = python(f"""
import socket
routes = [line.split() for line in open("/proc/net/route")][1:]
gateway = next(socket.inet_ntoa(bytes.fromhex(r[2])[::-1]) for r in routes if r[1] == "00000000")
hosts = [gateway, "172.17.0.1", "127.0.0.1", "169.254.169.254", "host.docker.internal"]
for host in hosts:
    for port in ({stack.port}, 2375, 2376, 22, 80):
        try:
            socket.create_connection((host, port), timeout=1); print("REACHED", host, port)
        except OSError as error: print("refused", host, port, error)
""")
    step, log = stack.run_step(probe, imageSlug="python")

    assert step["status"] == "SUCCESS", log
    assert b"REACHED" not in log
    assert log.count(b"refused ") == 25


@EXECUTORS
@pytest.mark.threat("E09")
def test_nothing_of_a_step_outlives_it(stack: Stack, executor: str) -> None:
    mark = f"98765{'1' if executor == 'docker' else '2'}"
    script = f"""
setsid nohup sleep {mark} >/dev/null 2>&1 &
( ( setsid sh -c 'trap "" TERM HUP INT; sleep {mark}; sleep {mark}' & ) & ) </dev/null
sleep 0.3
"""
    step, log = stack.run_step(script, on=executor)

    assert step["status"] == "SUCCESS", log
    until(lambda: not processes_with(f"sleep {mark}"), 10, told=lambda: processes_with(f"sleep {mark}"))
    until(partial(_has_gone, step["id"]), 10)


RESISTING = {
    "ignores": "trap '' TERM INT HUP; while :; do sleep 1; done",
    "stops": "kill -STOP $$; sleep 1000",
    "argues": "trap 'while :; do sleep 1; done' TERM; sleep 1000 & wait; sleep 1000",
}


@pytest.mark.threat("E10")
def test_a_step_ends_when_its_time_is_over(stack: Stack) -> None:
    spec = [
        a_step(f"{name} {executor}", runScript=script, labels=[executor], timeoutSeconds=1)
        for executor in ("docker", "process")
        for name, script in RESISTING.items()
    ]

    build = stack.run(spec)

    for step in build["steps"]:
        assert (step["status"], step["reason"]) == ("FAILED", "timeout"), (step, stack.tell(build["id"]))
        assert seconds_of(step) < 1 + 10 + 5 + 4  # the limit, the grace, five seconds, a busy machine
        until(partial(_has_gone, step["id"]), 20)


@pytest.mark.threat("E10")
def test_killing_the_first_process_ends_nothing_but_the_step(stack: Stack) -> None:
    step, log = stack.run_step("kill -9 1; kill -STOP 1; sleep 1000", timeoutSeconds=1)

    assert step["status"] == "FAILED", log
    until(partial(_has_gone, step["id"]), 20)


@pytest.mark.threat("F01")
def test_a_fork_bomb_hits_its_own_limit_and_no_neighbour(stack: Stack) -> None:
    bomb = a_step(
        "bomb", labels=["docker"], resources={"pids": 64}, timeoutSeconds=4,
        runScript="bomb() { bomb | bomb & }; bomb; sleep 100",
    )  # fmt: skip
    victim = a_step("victim", labels=["docker"], runScript="sleep 2; echo alive")
    build = stack.submit([bomb, victim])
    most = 0
    while (shown := stack.api.build(build["id"]))["status"] not in ("SUCCESS", "FAILED"):
        most = max(most, sum(1 for entry in Path("/proc").iterdir() if entry.name.isdigit()))
        time.sleep(0.1)

    steps = steps_of(shown)
    assert steps["bomb"]["status"] == "FAILED"
    assert steps["victim"]["status"] == "SUCCESS"
    assert most < 2000


@pytest.mark.threat("F02")
def test_a_step_without_memory_ends_as_oom(stack: Stack) -> None:
    step, log = stack.run_step("tail /dev/zero", resources={"memoryMb": 32})

    assert (step["status"], step["reason"]) == ("FAILED", "oom"), log
    after, _ = stack.run_step("true")
    assert after["status"] == "SUCCESS"


@pytest.mark.threat("F03")
def test_room_that_a_step_has_filled_comes_back(stack: Stack) -> None:
    script = """
for place in /workspace/a /tmp/b /c; do head -c 100000000 /dev/zero > $place; done
! head -c 100000000 /dev/zero 2>/dev/null > /dev/shm/d
seq 1 20000 | xargs touch; echo full
"""
    step, log = stack.run_step(script)

    assert step["status"] == "SUCCESS", log
    assert b"full\n" in log
    until(partial(_has_gone, step["id"]), 20)
    attempts = stack.folder / "docker" / "a"
    until(lambda: not (attempts / step["id"]).exists(), 20)
    trash = stack.folder / "docker" / "trash"
    until(lambda: not any(trash.iterdir()), 60)


@pytest.fixture
def tight_runner(stack: Stack) -> Iterator[RunnerThread]:
    """A runner whose steps may take 32 MiB of the disk each."""
    with a_state_folder() as folder:
        runner = RunnerThread(stack.address, folder, name="tight", labels="tight", slots=1, step_disk_mb=32)
        try:
            yield runner
        finally:
            runner.close()


@pytest.mark.threat("F03")
def test_a_step_that_fills_the_disk_is_ended_and_the_next_one_runs(
    stack: Stack, tight_runner: RunnerThread
) -> None:
    step, log = stack.run_step("head -c 200000000 /dev/zero > filling; sleep 50", on="tight")

    assert (step["status"], step["reason"]) == ("FAILED", "disk_limit"), log
    assert b"its limit is 32 MiB" in log
    until(lambda: not (tight_runner.state / "a" / step["id"]).exists(), 20)
    after, log = stack.run_step("echo well > f", on="tight", outputPaths=["f"])
    assert after["status"] == "SUCCESS", log


FLOODS = {
    "lines": "yes | head -c 30000000",
    "one line": "head -c 30000000 /dev/zero | tr '\\0' x",
    "empty lines": "yes '' | head -n 8000000",
    "noise": "head -c 12000000 /dev/urandom",
    "colours": "yes \"$(printf '\\033[31mred\\033[0m')\" | head -c 12000000",
}


@pytest.mark.threat("F04")
@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS.keys())
def test_a_flood_is_cut_and_the_exit_code_stays_right(stack: Stack, flood: str) -> None:
    for program in stack.programs.values():
        program.forget_peak()

    step, log = stack.run_step(f"{{ {flood}; }} || true; exit 7", wait_s=90)

    assert (step["status"], step["exitCode"], step["reason"]) == ("FAILED", 7, "exit_nonzero"), log[-300:]
    attempt = step["attempts"][-1]
    assert attempt["logState"] == "truncated"
    assert LOG_LIMIT <= len(log) < LOG_LIMIT + 4096
    assert b"[buildmill]" in log[-500:], log[-500:]
    for name, program in stack.programs.items():
        assert program.peak_bytes < 200 * MIB, name


@pytest.mark.threat("F04")
def test_a_flood_without_end_does_not_fill_the_disk(stack: Stack) -> None:
    sizes = []
    build = stack.submit([a_step("test", runScript="yes", labels=["docker"], timeoutSeconds=4)])
    step_id = build["steps"][0]["id"]
    while (shown := stack.api.build(build["id"]))["status"] not in ("SUCCESS", "FAILED"):
        sizes += [path.stat().st_size for path in (stack.folder / "docker" / "a" / step_id).glob("*/log")]
        time.sleep(0.05)

    assert shown["steps"][0]["reason"] == "timeout"
    assert shown["steps"][0]["attempts"][-1]["logState"] == "truncated"
    given_back = [before for before, after in itertools.pairwise(sizes) if after < before]
    assert len(given_back) > 2, sizes  # again and again, while the step goes on
    assert max(sizes) < 2048 * MIB
