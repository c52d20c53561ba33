"""Jobs for the tests of executors: `a_job` makes the attempt's folder and workspace as a runner would."""

import uuid
from pathlib import Path
from typing import Any

from runner.executor.base import Executor, Job


def a_job(folder: Path, script: str, **wishes: Any) -> Job:
    step_id = str(uuid.uuid4())
    attempt_dir, workspace = folder / f"a-{step_id}", folder / f"w-{step_id}"
    attempt_dir.mkdir(parents=True)
    workspace.mkdir()
    workspace.chmod(0o777)
    (attempt_dir / "script.sh").write_text(script, encoding="utf-8")
    fixed = {"runner": "test-runner", "build_id": "build", "attempt": 1, "image": "buildmill/busybox:1"}
    return Job(step_id=step_id, attempt_dir=attempt_dir, workspace=workspace, **{**fixed, **wishes})


def log_of(job: Job) -> str:
    return (job.attempt_dir / "log").read_text(encoding="utf-8", errors="replace")


def begin(executor: Executor, job: Job) -> Job:
    executor.create(job)
    executor.start(job)
    return job


def run(executor: Executor, job: Job, timeout_s: float = 60) -> Any:
    """How the job ended; the test fails if it does not."""
    begin(executor, job)
    ended = executor.wait(job, timeout_s=timeout_s)
    assert ended is not None, f"still running: {log_of(job)}"
    return ended
