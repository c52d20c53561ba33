"""What a user does before anything can be measured: images, projects, workflows, builds."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from scripts.benchmarks.servers import Coordinator

IMAGE = "buildmill/busybox:1"
FINISHED = frozenset({"SUCCESS", "FAILED"})


def a_step(name: str, run: str = "true", after: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    plain: dict[str, Any] = {"cacheDirs": [], "outputPaths": []}
    return {
        "name": name,
        "imageSlug": "box",
        "dependsOn": list(after),
        "runScript": run,
        **plain,
        **more,
    }


class BuildServer:
    """The Build Server API of one coordinator, in the order in which a user needs it."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._http = httpx.Client(base_url=coordinator.url, timeout=60, trust_env=False)
        self.post("/api/docker-images", {"slug": "box", "imageUrl": IMAGE})
        self.project: str = self.post("/api/projects", {"accountId": "bench", "name": "bench"})["id"]

    def close(self) -> None:
        self._http.close()

    def post(self, path: str, body: Any) -> Any:
        answer = self._http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def a_workflow(self, steps: Sequence[dict[str, Any]]) -> str:
        body = {"name": "bench", "steps": list(steps)}
        made: str = self.post(f"/api/projects/{self.project}/workflows", body)["id"]
        return made

    def a_build(self, workflow: str, repository: Path | None = None) -> str:
        made: str = self.post(*self.build_request(workflow, repository))["id"]
        return made

    def build_request(self, workflow: str, repository: Path | None = None) -> tuple[str, dict[str, Any]]:
        source = {"repoUrl": repository.as_uri(), "branch": "main"} if repository else {}
        return f"/api/projects/{self.project}/builds", {"workflowId": workflow, **source}

    def a_runner_secret(self) -> str:
        secret: str = self.post("/api/runners", {"name": "bench"})["runnerSecret"]
        return secret

    def build(self, build_id: str) -> dict[str, Any]:
        answer = self._http.get(f"/api/builds/{build_id}")
        answer.raise_for_status()
        shown: dict[str, Any] = answer.json()
        return shown

    def log(self, step_id: str) -> str:
        answer = self._http.get(f"/api/steps/{step_id}/log")
        answer.raise_for_status()
        return answer.text

    def first_of_log(self, step_id: str, length: int) -> str:
        """The beginning of a log that may be too long to be read whole."""
        with self._http.stream("GET", f"/api/steps/{step_id}/log") as answer:
            answer.raise_for_status()
            text = b""
            for piece in answer.iter_bytes():
                text += piece
                if len(text) >= length:
                    break
        return text[:length].decode(errors="replace")

    def finish(self, build_id: str, *, within_s: float) -> dict[str, Any]:
        """Wait for a build to succeed; anything else ends the measurement."""
        deadline = time.monotonic() + within_s
        while (build := self.build(build_id))["status"] not in FINISHED:
            if time.monotonic() > deadline:
                raise TimeoutError(f"build {build_id} did not end within {within_s:g} s")
            time.sleep(0.05)
        if build["status"] != "SUCCESS":
            logs = "\n".join(self.log(step["id"]) for step in build["steps"])
            raise RuntimeError(f"a build of the measurement failed: {json.dumps(build)[:2000]}\n{logs}")
        return build
