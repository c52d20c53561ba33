"""A network that goes away under a running step: packets are really lost, and connections really cut."""

import ctypes
import os
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path

from tests.factories import a_step
from tests.runner.state_folder import a_state_folder, needs_root
from tests.trip.stage import said_in, steps_of, until
from tests.trip.test_crashes import ONCE, Machines

CLONE_NEWNET = 0x40000000


@contextmanager
def a_network_of_our_own():
    """This thread and the processes that it starts are alone in it; afterwards the thread is back."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "no network of our own")
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        try:
            yield
        finally:
            assert libc.setns(before, CLONE_NEWNET) == 0
    finally:
        os.close(before)


@contextmanager
def a_cut(port: int, *verdict: str):
    """Nothing gets to the coordinator while this lasts."""

    def change(what: str) -> None:
        rule = ["INPUT", "-p", "tcp", "--dport", str(port), "-j", *verdict]
        subprocess.run(["iptables", "--wait", what, *rule], check=True)

    change("-I")
    try:
        yield
    finally:
        change("-D")


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


@needs_root
def test_a_step_goes_on_through_cuts_of_the_network_and_its_log_is_whole():
    """In the first the packets vanish; in the second, in which it ends, every connection is reset."""
    with a_network_of_our_own(), a_state_folder() as folder, closing(Machines(folder)) as machines:
        said, go = folder / "said", folder / "go"
        talk = f"echo x >> {folder}/ran; for n in $(seq 0 149); do echo $n | tee -a {said}; sleep 0.02; done"
        wait = f"until test -e {go}; do sleep 0.02; done; echo x > out; echo over | tee -a {said}"
        spec = [a_step("a", runScript=f"{talk}; {wait}", outputPaths=["out"]), a_step("b", ["a"])]
        build = machines.user.submit(spec)
        step_id = steps_of(build)["a"]["id"]
        machines.user.await_log(step_id, b"\n10\n")

        with a_cut(machines.port, "DROP"):
            until(lambda: lines_of(said) == 150)
        machines.user.await_log(step_id, b"\n149\n")
        with a_cut(machines.port, "REJECT", "--reject-with", "tcp-reset"):
            go.touch()
            until(lambda: lines_of(said) == 151)
            until(lambda: machines.runner.output.count("heartbeat_unanswered") > 1)
        build = machines.user.await_end(build["id"])

        assert build["status"] == "SUCCESS", machines.user.tell(build["id"])
        assert (folder / "ran").read_text() == "x\n"
        assert (
            said_in(machines.user.log(step_id)) == "".join(f"{n}\n" for n in range(150)).encode() + b"over\n"
        )
        assert [machines.user.transitions(step["id"]) for step in build["steps"]] == [ONCE, ONCE]
