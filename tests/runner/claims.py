"""Claims as a coordinator hands them out."""

from typing import Any

from runner.attempt import Attempt
from runner.proof import Proof
from shared.protocol import Claim, Limits
from shared.script import render_step_script, script_digest


def a_claim(run_script: str = "echo hello", **fields: Any) -> Claim:
    script = render_step_script(name="test", run_script=run_script, env={}, variables={"CI": "true"})
    known: dict[str, Any] = {
        "step_id": "step-1",
        "attempt": 1,
        "lease": "the-lease",
        "build_id": "build-1",
        "project_id": "project-1",
        "name": "test",
        "script": script,
        "script_sha256": script_digest(script),
        "image": "buildmill/busybox:1",
        "limits": Limits(timeout_s=60),
    }
    return Claim(**{**known, **fields})


def an_attempt(step_id: str = "step-1", attempt: int = 1) -> Attempt:
    return Attempt(Proof(step_id, attempt, "the-lease"))
