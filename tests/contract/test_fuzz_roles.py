"""Whoever asks, as any role and beside another tenant: the fuzzer finds no answer that tells too much."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from coordinator.app import ALL_ENDPOINTS
from tests.contract.fuzzing import ROLES, share_of

ROOT = Path(__file__).parents[2]
IS_FULL = bool(os.environ.get("BUILDMILL_TEST_FULL"))


PARTS = range(len(ROLES))


@pytest.mark.parametrize("part", PARTS)
def test_in_each_part_every_operation_falls_to_one_role(part: int) -> None:
    operations = [f"GET /{number}" for number in range(100)]

    taken = [name for role in ROLES for name in share_of(role, operations, part=part, share=len(ROLES))]

    assert sorted(taken) == sorted(operations)


@pytest.mark.parametrize("role", ROLES)
def test_in_all_parts_together_each_role_takes_every_operation(role: str) -> None:
    operations = [f"GET /{number}" for number in range(100)]

    taken = [name for part in PARTS for name in share_of(role, operations, part=part, share=len(ROLES))]

    assert sorted(taken) == sorted(operations)


@pytest.mark.threat("A12")
@pytest.mark.threat("L20")
@pytest.mark.timeout(6 * 3600 if IS_FULL else 420)
def test_whoever_asks_is_answered_as_specified_and_learns_nothing_of_other_tenants() -> None:
    # each operation in one role, which one by the commit; the whole run takes all of them in every role
    part = ["--share", str(len(ROLES)), "--part", str(number_of_commit() % len(ROLES))]
    share = ["--examples", "300"] if IS_FULL else ["--examples", "5", "--seed", "1", *part]
    command = ["scripts/fuzz", "--as", "everybody", *share]

    answer = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=5 * 3600 if IS_FULL else 400
    )

    assert answer.returncode == 0, answer.stdout[-20_000:] + answer.stderr[-5_000:]
    tested = sum(int(count) for count in re.findall(r"Tested: ([0-9]+)", answer.stdout))
    assert tested == (len(ALL_ENDPOINTS) - 1) * (len(ROLES) if IS_FULL else 1)


def number_of_commit() -> int:
    """Another one for each commit, and the same for the same; 1 where there is no history."""
    command = ["git", "rev-parse", "HEAD"]
    head = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    return int(head.stdout[:8], 16) if head.returncode == 0 else 1
