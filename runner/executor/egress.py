"""Keeps steps away from the machine they run on and from its cloud's metadata; the only place with iptables.

Two chains of ours hang in INPUT (the machine itself) and in DOCKER-USER (what it forwards). They match only
traffic that comes in from our own bridge, and each call replaces them whole.
"""

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TO_MACHINE: Final = "BUILDMILL-IN"
OUTWARD: Final = "BUILDMILL-OUT"
LOCK_S: Final = 20

ALWAYS_REFUSED: Final = (
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",  # link-local, with the metadata service of most clouds
    "100.100.100.200/32",  # metadata, elsewhere
    "168.63.129.16/32",
    "192.0.0.192/32",
    "224.0.0.0/4",
)
PRIVATE: Final = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")


@dataclass(frozen=True, order=True)
class Endpoint:
    """One address and port that steps may reach although its range is refused."""

    address: str
    port: int
    protocol: str = "tcp"


def is_refused_by_default(address: str) -> bool:
    """Whether an address lies in a range that needs an exception."""
    parsed = ipaddress.ip_address(address)
    return parsed.version == 4 and any(parsed in ipaddress.ip_network(r) for r in (*ALWAYS_REFUSED, *PRIVATE))


def apply_rules(bridge: str, *, refuse_private: bool, exceptions: Iterable[Endpoint] = ()) -> str | None:
    """Put the rules in place; a sentence that says why they are not, or None when they are."""
    if os.geteuid() != 0:
        return "steps can reach this machine's own addresses: only a runner with root can refuse that"
    if shutil.which("iptables") is None or shutil.which("iptables-restore") is None:
        return "steps can reach this machine's own addresses: install iptables to refuse that"
    try:
        _run(["iptables-restore", "--noflush", "-w", str(LOCK_S)], rules_text(refuse_private, exceptions))
        for parent, chain in (("INPUT", TO_MACHINE), ("DOCKER-USER", OUTWARD)):
            _hang(parent, chain, bridge)
    except subprocess.CalledProcessError as error:
        return f"steps can reach this machine's own addresses: iptables refuses: {error.stderr.strip()}"
    except subprocess.TimeoutExpired:
        return "steps can reach this machine's own addresses: iptables does not answer"
    return None


def rules_text(refuse_private: bool, exceptions: Iterable[Endpoint]) -> str:
    """Both chains as iptables-restore reads them: replaced in one go, never half there."""
    answers = "-m conntrack --ctstate ESTABLISHED,RELATED -j RETURN"
    refused = ALWAYS_REFUSED + (PRIVATE if refuse_private else ())
    lines = ["*filter", f":{TO_MACHINE} - [0:0]", f":{OUTWARD} - [0:0]"]
    lines += [f"-A {TO_MACHINE} {answers}", f"-A {TO_MACHINE} -j REJECT", f"-A {OUTWARD} {answers}"]
    lines += [
        f"-A {OUTWARD} -d {e.address}/32 -p {e.protocol} -m {e.protocol} --dport {e.port} -j RETURN"
        for e in sorted(set(exceptions))
    ]
    lines += [f"-A {OUTWARD} -d {network} -j REJECT" for network in refused]
    return "\n".join([*lines, "COMMIT", ""])


def find_resolvers(configs: Iterable[Path] = (Path("/etc/resolv.conf"),)) -> list[Endpoint]:
    """The machine's name servers in ranges that are refused: without them a step could resolve nothing."""
    found = []
    for config in configs:
        if not config.is_file():
            continue
        for line in config.read_text(encoding="utf-8", errors="replace").splitlines()[:100]:
            words = line.split()
            if len(words) >= 2 and words[0] == "nameserver" and _needs_exception(words[1]):
                found += [Endpoint(words[1], 53, protocol) for protocol in ("udp", "tcp")]
    return found


def _needs_exception(address: str) -> bool:
    try:
        return is_refused_by_default(address) and not ipaddress.ip_address(address).is_loopback
    except ValueError:  # with a zone, or no address at all
        return False


def _hang(parent: str, chain: str, bridge: str) -> None:
    rule = ["-i", bridge, "-j", chain]
    iptables = ["iptables", "-w", str(LOCK_S)]
    there = subprocess.run(
        [*iptables, "-C", parent, *rule], capture_output=True, timeout=LOCK_S + 5, check=False
    )
    if there.returncode != 0:
        _run([*iptables, "-I", parent, "1", *rule])


def _run(argv: list[str], text: str = "") -> None:
    subprocess.run(argv, input=text, capture_output=True, text=True, timeout=LOCK_S + 5, check=True)
