"""A fuzzer that reads our specification finds no request that the coordinator answers otherwise."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from coordinator.app import ALL_ENDPOINTS

ROOT = Path(__file__).parents[2]
EXCEPTIONS = tomllib.loads((Path(__file__).parent / "fuzz_exceptions.toml").read_text())["exception"]
IS_FULL = bool(os.environ.get("BUILDMILL_TEST_FULL"))


def test_every_exception_names_an_operation_that_exists_and_a_reason() -> None:
    existing = {f"{endpoint.method} {endpoint.path}" for endpoint in ALL_ENDPOINTS}

    named = {operation for exception in EXCEPTIONS for operation in exception["operations"]}

    assert named - existing == set()
    assert all(len(exception["reason"]) > 20 for exception in EXCEPTIONS)


@pytest.mark.threat("L20")
@pytest.mark.timeout(6 * 3600 if IS_FULL else 420)
def test_the_coordinator_holds_to_its_own_specification() -> None:
    # the same cases for every commit, so that a failure is the commit's; the whole run takes others each time
    command = ["scripts/fuzz", *(["--examples", "1000"] if IS_FULL else ["--examples", "10", "--seed", "1"])]

    answer = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=5 * 3600 if IS_FULL else 400
    )

    assert answer.returncode == 0, answer.stdout[-20_000:] + answer.stderr[-5_000:]
    # that it found nothing means something only when it looked at everything
    tested = re.search(r"Tested: ([0-9]+)", answer.stdout)
    assert tested is not None, answer.stdout
    # all but the one that it has the specification from
    assert int(tested[1]) == len(ALL_ENDPOINTS) - 1
