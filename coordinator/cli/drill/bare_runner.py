"""A runner without a machine: it takes steps and says about them whatever a fault wants said."""

import secrets
from dataclasses import dataclass
from typing import Any

import httpx

from coordinator.cli.drill.errors import Refused
from shared import paths
from shared.protocol import Acquire, Claim, Claims, Registered, Registration, Resume

WAIT_S = 5


@dataclass(frozen=True)
class Said:
    """An answer of the coordinator, as it is compared and shown."""

    status: int
    body: dict[str, Any]

    @property
    def code(self) -> str:
        return str(self.body.get("code", ""))


class BareRunner:
    """Speaks the runner protocol by hand and repeats nothing by itself."""

    def __init__(self, address: str, token: str, *, name: str, label: str) -> None:
        self.session = secrets.token_hex(8)
        self._label = label
        self._http = httpx.Client(base_url=address, timeout=30.0, trust_env=False)
        said = Registration(name=name, labels=[label], platform="drill", version="drill")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = self._send("POST", paths.REGISTER, content=_json(said), headers={**_JSON, **headers})
        if answer.status_code != 201:
            raise Refused(f"the drill's client cannot register: {answer.status_code} {answer.text[:300]}")
        made = Registered.model_validate_json(answer.content)
        self._http.headers["Authorization"] = f"Bearer {made.runner_secret}"
        self._send("POST", paths.RESUME, content=_json(Resume(session=self.session)), headers=_JSON)

    def close(self) -> None:
        """Say goodbye, so that a claim nobody acknowledged is ready again at once."""
        try:
            self._send("POST", paths.BYE)
        finally:
            self._http.close()

    def take(self, slots: int = 1, *, wait_s: int = WAIT_S) -> list[Claim]:
        """The steps that are ready for this drill, waiting a little for the first of them."""
        said = Acquire(
            request_id=secrets.token_hex(12),
            session=self.session,
            slots=slots,
            labels=[self._label],
            only_labelled=True,
            wait=wait_s,
        )
        answer = self._send("POST", paths.ACQUIRE, content=_json(said), headers=_JSON)
        if answer.status_code == 204:
            return []
        if answer.status_code != 200:
            raise Refused(f"acquire answered {answer.status_code}: {answer.text[:300]}")
        return Claims.model_validate_json(answer.content).claims

    def start(self, claim: Claim) -> Said:
        return self._post(claim, paths.START, {})

    def complete(self, claim: Claim, status: str, **more: Any) -> Said:
        return self._post(claim, paths.COMPLETE, {"status": status, **more})

    def append(self, claim: Claim, offset: int, data: bytes) -> Said:
        answer = self._send(
            "POST",
            paths.LOG.format(step_id=claim.step_id),
            params={"offset": offset},
            content=data,
            headers={**_proof(claim), "Content-Type": "application/octet-stream"},
        )
        return _said(answer)

    def heartbeat(self, *claims: Claim) -> Said:
        reports = [
            {"stepId": one.step_id, "attempt": one.attempt, "lease": one.lease, "phase": "running"}
            for one in claims
        ]
        body = {"session": self.session, "attempts": reports}
        return _said(self._send("POST", paths.HEARTBEAT, json=body))

    def _post(self, claim: Claim, path: str, body: dict[str, Any]) -> Said:
        path = path.format(step_id=claim.step_id)
        return _said(self._send("POST", path, json=body, headers=_proof(claim)))

    def _send(self, method: str, path: str, **more: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise Refused(f"{method} {path}: {error or type(error).__name__}") from error


_JSON = {"Content-Type": "application/json"}


def _json(said: Registration | Acquire | Resume) -> bytes:
    return said.model_dump_json(by_alias=True, exclude_none=True).encode()


def _proof(claim: Claim) -> dict[str, str]:
    return {paths.ATTEMPT_HEADER: str(claim.attempt), paths.LEASE_HEADER: claim.lease}


def _said(answer: httpx.Response) -> Said:
    try:
        body = answer.json()
    except ValueError:
        body = {"text": answer.text[:300]}
    return Said(answer.status_code, body if isinstance(body, dict) else {"body": body})
