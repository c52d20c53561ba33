"""What a step can do to the machine, to its neighbours and to its own verdict."""

import http.server
import json
import re
import socket
import threading
import time
from pathlib import Path

import pytest

from shared.reasons import Reason
from tests.runner.jobs import a_job, begin, log_of, run

pytestmark = pytest.mark.engine

PYTHON = "buildmill/python:3"
# CHOWN DAC_OVERRIDE FOWNER KILL SETGID SETUID NET_BIND_SERVICE
ALLOWED_CAPABILITIES = {0, 1, 3, 5, 6, 7, 10}
EPERM, EACCES, EROFS, ENOSYS, ENOENT = 1, 13, 30, 38, 2
FILES = {"core_pattern", "sysrq", "release_agent", "kcore"}  # not every kernel has them all

PROBES = r"""
import ctypes, json, os, platform
libc = ctypes.CDLL(None, use_errno=True)
amd = platform.machine() == "x86_64"
NR = dict(mount=165, init_module=175, ptrace=101, bpf=321, perf_event_open=298, io_uring_setup=425,
          userfaultfd=323, keyctl=250, open_by_handle_at=304, unshare=272, setns=308, process_vm_writev=311,
          clone3=435, add_key=248) if amd else dict(mount=40, init_module=105, ptrace=117, bpf=280,
          perf_event_open=241, io_uring_setup=425, userfaultfd=282, keyctl=219, open_by_handle_at=265,
          unshare=97, setns=268, process_vm_writev=271, clone3=435, add_key=217)

def call(name, *args):
    ctypes.set_errno(0)
    answer = libc.syscall(NR[name], *args)
    return ctypes.get_errno() if answer == -1 else 0

def attempt(action):
    try:
        action()
    except OSError as error:
        return error.errno
    return 0

import socket
print(json.dumps({
    "mount": call("mount", b"none", b"/mnt", b"tmpfs", 0, None),
    "unshare user": call("unshare", 0x10000000),
    "unshare net": call("unshare", 0x40000000),
    "setns": call("setns", 0, 0),
    "clone3": call("clone3", None, 0),
    "mknod": attempt(lambda: os.mknod("/tmp/sda", 0o060600, os.makedev(8, 0))),
    "init_module": call("init_module", None, 0, b""),
    "ptrace 1": call("ptrace", 16, 1, 0, 0),
    "process_vm_writev 1": call("process_vm_writev", 1, None, 0, None, 0, 0),
    "bpf": call("bpf", 0, None, 0),
    "perf_event_open": call("perf_event_open", None, 0, -1, -1, 0),
    "io_uring_setup": call("io_uring_setup", 1, None),
    "userfaultfd": call("userfaultfd", 0),
    "keyctl": call("keyctl", 0, -3, 0),
    "add_key": call("add_key", b"user", b"x", b"y", 1, -3),
    "AF_ALG": attempt(lambda: socket.socket(38, socket.SOCK_SEQPACKET)),
    "AF_VSOCK": attempt(lambda: socket.socket(40, socket.SOCK_STREAM)),
    "AF_PACKET": attempt(lambda: socket.socket(17, socket.SOCK_RAW)),
    "open_by_handle_at": call("open_by_handle_at", -1, None, 0),
    "core_pattern": attempt(lambda: open("/proc/sys/kernel/core_pattern", "w")),
    "sysrq": attempt(lambda: open("/proc/sysrq-trigger", "w")),
    "release_agent": attempt(lambda: open("/sys/fs/cgroup/memory/release_agent", "w")),
    "kcore": attempt(lambda: open("/proc/kcore", "wb")),
}))
"""

ORDINARY = """
import asyncio, mmap, multiprocessing, os, select, socket, sqlite3, subprocess, threading

if __name__ == "__main__":
    socket.socketpair(); socket.socket(); socket.socket(socket.AF_UNIX); socket.socket(socket.AF_NETLINK, 3)
    asyncio.run(asyncio.sleep(0)); threading.Thread(target=print).start()
    assert multiprocessing.get_context("spawn").Pool(2).map(abs, [-1]) == [1]
    sqlite3.connect("/workspace/x").execute("create table t(a)")
    subprocess.run(["git", "init", "-q", "/workspace/repo"], check=True)
    os.mkfifo("/tmp/fifo"); os.chown("/tmp/fifo", 7, 7); os.memfd_create("x"); os.eventfd(0)
    mmap.mmap(-1, 4096); select.epoll(); os.getrandom(4); os.sched_getaffinity(0); os.setpriority(0, 0, 5)
    print("all well")
"""

REACH = """
import socket
routes = [line.split() for line in open("/proc/net/route")][1:]
gateway = next(socket.inet_ntoa(bytes.fromhex(r[2])[::-1]) for r in routes if r[1] == "00000000")
targets = [(gateway, {port}), ("172.17.0.1", {port}), ("{machine}", {port}), (gateway, 2375),
           ("169.254.169.254", 80), ("100.100.100.200", 80), ("10.0.0.1", 80), ("192.168.0.1", 80)]
for target in targets:
    line = socket.socket()
    line.settimeout(3)
    try:
        line.connect(target)
        print("REACHED", target)
    except OSError as error:
        print("refused", target, error)
"""


@pytest.fixture
def job(runner, tmp_path):
    """Makes jobs of this test's runner."""
    return lambda script, **wishes: a_job(tmp_path, script, runner=runner, **wishes)


def python(program: str) -> str:
    return f"cat >/tmp/program.py <<'PROGRAM'\n{program}\nPROGRAM\npython3 /tmp/program.py\n"


@pytest.mark.threat("E02")
@pytest.mark.parametrize("user", ["root", "image"])
def test_a_step_holds_few_capabilities_and_can_gain_none(executor, job, user) -> None:
    attempt = job("cat /proc/self/status", user=user)
    run(executor, attempt)

    status = dict(re.findall(r"^(\w+):\s*(\S+)$", log_of(attempt), re.MULTILINE))

    for kind in ("CapEff", "CapPrm", "CapBnd"):
        held = {bit for bit in range(64) if int(status[kind], 16) >> bit & 1}
        assert held <= ALLOWED_CAPABILITIES
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@pytest.mark.threat("E03")
def test_every_probe_of_the_kernel_is_refused(executor, job) -> None:
    attempt = job(python(PROBES), image=PYTHON)

    assert run(executor, attempt).succeeded, log_of(attempt)
    answers = json.loads(log_of(attempt).splitlines()[-1])

    refused = (EPERM, EACCES, EROFS, ENOSYS)
    reached = {n: code for n, code in answers.items() if code not in refused}
    assert all(name in FILES and code == ENOENT for name, code in reached.items()), reached
    ours = ("AF_ALG", "AF_VSOCK", "io_uring_setup", "userfaultfd", "keyctl", "ptrace 1", "unshare user")
    assert {answers[name] for name in ours} == {EPERM}  # the kernel itself would have said otherwise


@pytest.mark.threat("E03")
def test_ordinary_programs_do_not_notice_the_filter(executor, job) -> None:
    attempt = job(python(ORDINARY), image=PYTHON)

    assert run(executor, attempt).succeeded, log_of(attempt)
    assert "all well" in log_of(attempt)


@pytest.mark.threat("E04")
def test_no_socket_process_or_mount_of_the_machine_is_in_sight(executor, job) -> None:
    script = (
        "ls /var/run/docker.sock /run/docker.sock /run/containerd/containerd.sock 2>/dev/null && exit 1\n"
        "echo pids; ls /proc | grep -c '^[0-9]'; echo mounts; awk '{print $2}' /proc/mounts"
    )
    attempt = job(script)

    assert run(executor, attempt).succeeded, log_of(attempt)
    lines = log_of(attempt).splitlines()

    assert int(lines[lines.index("pids") + 1]) < 15
    mounts = set(lines[lines.index("mounts") + 1 :])
    ours = {"/workspace", *(f"/buildmill/{name}" for name in ("launch.sh", "script.sh", "log", "rc", "pipe"))}
    of_the_engine = {
        "/",
        "/etc/resolv.conf",
        "/etc/hostname",
        "/etc/hosts",
        "/sbin/docker-init",
        "/bin/docker-init",
    }
    rest = mounts - ours - of_the_engine
    assert {path for path in rest if not re.match(r"/(proc|sys|dev)(/|$)", path)} <= {"/usr/sbin/docker-init"}
    assert ours <= mounts


@pytest.mark.threat("E06")
def test_files_of_the_launcher_can_be_neither_removed_nor_replaced(executor, job) -> None:
    script = (
        "cd /buildmill; rm -f launch.sh script.sh log rc pipe 2>/dev/null; mv log x 2>/dev/null\n"
        "ln -sf /etc/shadow log 2>/dev/null; echo x >launch.sh; ls; exit 7"
    )
    attempt = job(script)

    ended = run(executor, attempt)

    assert (ended.rc, ended.code) == (7, 7)
    assert {"launch.sh", "script.sh", "log", "rc", "pipe"} <= set(log_of(attempt).split())


def test_a_forged_exit_code_is_no_success(executor, job) -> None:
    ended = run(executor, job("echo 0 >/buildmill/rc; kill -9 $PPID; sleep 1000"))

    assert ended.rc == 0
    assert not ended.succeeded
    assert ended.reason is Reason.KILLED


@pytest.mark.threat("E07")
def test_neighbours_on_one_runner_cannot_reach_each_other(executor, job) -> None:
    server = job(
        "ip -4 addr show eth0 | grep -o 'inet [0-9.]*'; echo secret >/workspace/s; touch /dev/shm/s\n"
        "mkdir /tmp/www; busybox nc -l -p 8000 -e cat",
    )
    begin(executor, server)
    until = time.monotonic() + 30
    while "inet" not in log_of(server):
        assert time.monotonic() < until
        time.sleep(0.02)
    address = log_of(server).split()[1]

    script = (
        f"busybox nc -w 3 {address} 8000 </dev/null && echo REACHED\n"
        "ls /workspace /dev/shm; cat /proc/net/unix; true"
    )
    client = job(script)
    run(executor, client)

    assert "REACHED" not in log_of(client)
    assert "secret" not in log_of(client)
    assert "\ns\n" not in log_of(client)


@pytest.mark.threat("E08")
def test_the_machine_and_its_metadata_cannot_be_reached(executor, job) -> None:
    hits: list[str] = []

    class Service(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    service = http.server.ThreadingHTTPServer(("0.0.0.0", 0), Service)
    thread = threading.Thread(target=service.serve_forever)
    thread.start()
    port = service.server_address[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward:
        outward.connect(("198.51.100.1", 9))
        machine = outward.getsockname()[0]
    program = REACH.format(port=port, machine=machine)
    attempt = job(python(program), image=PYTHON)
    try:
        ended = run(executor, attempt)
    finally:
        service.shutdown()
        thread.join()
        service.server_close()

    assert ended.succeeded, log_of(attempt)
    assert executor.notes == []
    assert "REACHED" not in log_of(attempt)
    assert log_of(attempt).count("refused (") == 8
    assert hits == []


@pytest.mark.threat("E09")
def test_daemons_die_with_the_step(executor, job) -> None:
    attempt = job(
        "setsid nohup sleep 4242 >/dev/null 2>&1 & (setsid sleep 4242 >/dev/null 2>&1 &) ; echo done"
    )

    begun = time.monotonic()
    ended = run(executor, attempt)

    assert ended.succeeded
    assert time.monotonic() - begun < 10
    running = [p for p in Path("/proc").glob("[0-9]*/cmdline") if b"sleep\x004242" in _read(p)]
    assert running == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.threat("E10")
@pytest.mark.parametrize(
    "script",
    [
        "trap '' TERM; echo on; while :; do sleep 1; done",
        "echo on; kill -STOP $$; sleep 1000",
        "kill -9 1; kill -STOP 1; echo on; sleep 1000 & trap '' TERM; wait; sleep 1000",
    ],
)
def test_a_step_that_resists_term_dies_by_kill(executor, job, script) -> None:
    attempt = begin(executor, job(script))
    until = time.monotonic() + 30
    while "on" not in log_of(attempt):
        assert time.monotonic() < until
        time.sleep(0.01)

    executor.kill(attempt, hard=False)
    executor.wait(attempt, timeout_s=0.3)
    begun = time.monotonic()
    executor.kill(attempt, hard=True)
    ended = executor.wait(attempt, timeout_s=30)

    assert not ended.succeeded
    assert time.monotonic() - begun < 5


@pytest.mark.threat("F01")
def test_a_fork_bomb_hits_its_own_limit(executor, job) -> None:
    attempt = begin(executor, job("bomb() { bomb | bomb & }; bomb; sleep 3; exit 0", pids=60))

    executor.wait(attempt, timeout_s=3)
    processes = sum(1 for entry in Path("/proc").iterdir() if entry.name.isdigit())
    executor.kill(attempt, hard=True)
    ended = executor.wait(attempt, timeout_s=30)

    assert processes < 2000
    assert ended is not None


@pytest.mark.threat("F02")
def test_too_much_memory_ends_as_oom(executor, job) -> None:
    ended = run(executor, job("tail /dev/zero", memory_mb=32))

    assert ended.reason is Reason.OOM


@pytest.mark.threat("F02")
def test_a_child_that_ran_out_of_memory_may_be_survived(executor, job) -> None:
    ended = run(executor, job("tail /dev/zero || true; echo alive", memory_mb=32))

    assert ended.succeeded


@pytest.mark.threat("F04")
@pytest.mark.parametrize(
    "flood",
    [
        "yes | head -c 60000000",
        "head -c 60000000 /dev/zero",
        "yes '' | head -n 5000000",
        "head -c 20000000 /dev/urandom",
    ],
)
def test_a_flood_of_output_keeps_the_exit_code_right(executor, job, flood) -> None:
    ended = run(executor, job(f"{flood}; exit 5"))

    assert (ended.rc, ended.code, ended.reason) == (5, 5, None)
