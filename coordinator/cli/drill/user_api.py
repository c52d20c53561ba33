"""What the drill asks of the coordinator as its user: a project, builds, and all that can be read of them."""

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx

from coordinator.cli.drill.errors import Refused, Unusable
from coordinator.cli.drill.history import History, SeenArtifact, SeenAttempt, SeenStep

TRIES = 4
PAUSE_S = 0.5
TIMEOUT_S = 15.0
FINAL = ("SUCCESS", "FAILED")


class UserApi:
    """One coordinator at an address, with the token of its user where it wants one."""

    def __init__(self, address: str, token: str) -> None:
        self.address = address
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=address, headers=headers, timeout=httpx.Timeout(TIMEOUT_S, connect=5.0), trust_env=False
        )

    def close(self) -> None:
        self._http.close()

    def require_usable(self) -> None:
        """Unusable, unless a coordinator answers there and lets this user in."""
        try:
            answer = self._http.get("/api/runners")
        except httpx.HTTPError as error:
            raise Unusable(
                f"no coordinator answers at {self.address}: {error or type(error).__name__}"
            ) from error
        if answer.status_code in (401, 403):
            raise Unusable(
                f"the coordinator at {self.address} does not let the drill in: --token-file has to name a "
                "file with the token of a user, such as keys/admin-token in its data folder"
            )
        if answer.status_code != 200:
            raise Unusable(f"what answers at {self.address} is no coordinator: it says {answer.status_code}")

    def knows_field(self, name: str) -> bool:
        """Whether the specification of this coordinator speaks of a field; older ones lack some."""
        return f'"{name}"' in self.ask("GET", "/openapi.json").text

    def ask(self, method: str, path: str, *, accept: Sequence[int] = (200,), **more: Any) -> httpx.Response:
        """Send a request; reading is tried again when the network fails, writing is not."""
        for left in reversed(range(TRIES if method == "GET" else 1)):
            try:
                answer = self._http.request(method, path, **more)
                break
            except httpx.HTTPError as error:
                if not left:
                    raise Refused(f"{method} {path}: {error or type(error).__name__}") from error
                time.sleep(PAUSE_S)
        if answer.status_code not in accept:
            raise Refused(f"{method} {path} answered {answer.status_code}: {answer.text[:300]}")
        return answer

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = self.ask("POST", path, accept=(201,), json=body).json()
        return made

    def build(self, build_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/api/builds/{build_id}").json()
        return found

    def log(self, step_id: str, attempt: int | None = None) -> bytes:
        """The bytes of a log; none when there is no such attempt yet."""
        query = {} if attempt is None else {"attempt": attempt}
        answer = self.ask("GET", f"/api/steps/{step_id}/log", accept=(200, 404), params=query)
        return answer.content if answer.status_code == 200 else b""

    def cancel(self, build_id: str) -> str:
        """The id of the receipt; empty when the build has ended already."""
        answer = self.ask("POST", f"/api/builds/{build_id}/cancel", accept=(202, 404, 409))
        return str(answer.json()["cancelId"]) if answer.status_code == 202 else ""

    def receipt(self, cancel_id: str) -> dict[str, Any]:
        """What has come of a cancel."""
        found: dict[str, Any] = self.ask("GET", f"/api/cancels/{cancel_id}").json()
        return found

    def delete(self, path: str) -> None:
        self.ask("DELETE", path, accept=(204, 404))

    def runner_id(self, name: str) -> str:
        """The id of a runner that registered under this name; empty when none has."""
        for runner in self.ask("GET", "/api/runners").json():
            if runner["name"] == name:
                return str(runner["id"])
        return ""

    def history(self, project_id: str, build_id: str) -> History:
        """The whole build as it stands: steps, attempts, logs, outputs and what the trail tells."""
        build = self.build(build_id)
        artifacts = self._artifacts(build_id)
        events = self._events(project_id)
        return History(
            build_id,
            build["status"],
            tuple(
                SeenStep(
                    name=step["name"],
                    status=step["status"],
                    reason=step.get("reason") or "",
                    depends_on=tuple(step["dependsOn"]),
                    started_at=step.get("startedAt") or "",
                    finished_at=step.get("finishedAt") or "",
                    attempts=tuple(self._attempt(step["id"], attempt) for attempt in step["attempts"]),
                    artifacts=tuple(artifacts.get(step["id"], ())),
                    events=tuple(events.get(step["id"], ())),
                )
                for step in build["steps"]
            ),
        )

    def _attempt(self, step_id: str, attempt: dict[str, Any]) -> SeenAttempt:
        return SeenAttempt(
            number=attempt["attempt"],
            outcome=attempt.get("outcome") or "",
            reason=attempt.get("reason") or "",
            log=self.log(step_id, attempt["attempt"]),
            log_size=attempt["logSize"],
            log_sha256=attempt.get("logSha256") or "",
            log_state=attempt["logState"],
        )

    def _artifacts(self, build_id: str) -> dict[str, list[SeenArtifact]]:
        found: dict[str, list[SeenArtifact]] = {}
        for artifact in self.ask("GET", f"/api/builds/{build_id}/artifacts").json():
            data = b""
            if artifact["type"] == "file":
                data = self.ask("GET", f"/api/artifacts/{artifact['id']}").content
            seen = SeenArtifact(artifact["path"], artifact["sha256"], data)
            found.setdefault(artifact["stepId"], []).append(seen)
        return found

    def _events(self, project_id: str) -> dict[str, list[tuple[str, int]]]:
        path = f"/api/audit-logs?limit=1000&projectId={quote(project_id)}"
        found: dict[str, list[tuple[str, int]]] = {}
        for record in reversed(self.ask("GET", path).json()["auditLogs"]):
            about = record.get("details") or {}
            if "stepId" in about and "attempt" in about:
                found.setdefault(about["stepId"], []).append((record["action"], about["attempt"]))
        return found
