"""`buildmill drill` with steps in containers: two faults, and what the engine shows afterwards."""

import json
import re
import subprocess
import sys
from pathlib import Path

import docker
import pytest

from tests.trip.stage import ROOT, an_engine_stage

pytestmark = pytest.mark.engine


def test_steps_in_containers_outlive_their_runner_and_wedged_ones_are_ended(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    options = ["--executor", "docker", "--steps", "3"]
    options += ["--only", "killed-runner,wedged-step", "--json", str(record)]
    with an_engine_stage() as stage:
        argv = [sys.executable, "-m", "coordinator", "drill", "--coordinator", stage.address, *options]

        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)

        runners = stage.api.get("/api/runners")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())
    assert [(fault["fault"], fault["outcome"]) for fault in found["faults"]] == [
        ("killed-runner", "held"),
        ("wedged-step", "held"),
    ]
    assert re.search(r"verdict: every promise held: 0 duplicates, 0 losses", done.stdout)
    api = docker.APIClient(version="auto")
    try:
        labels = [{"label": f"buildmill.runner={runner['id']}"} for runner in runners]
        assert [api.containers(all=True, filters=label) for label in labels] == [[]] * len(runners)
    finally:
        api.close()
