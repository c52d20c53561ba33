"""Tenants, their administrators and enrolment tokens: who becomes a runner, and of which tenant."""

import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import httpx

from coordinator.access_tables import ApiToken
from coordinator.actions.register_runner import secret_hash
from coordinator.api.identify import API_TOKEN_PREFIX
from coordinator.api.state import AppState
from coordinator.rules.permissions import Role, permissions_of
from coordinator.store.tenants import ensure_tenant
from shared.ids import new_id


@dataclass(frozen=True)
class Member:
    """Somebody of one tenant, by the credential of a program."""

    client: httpx.Client
    tenant_id: str
    account: str
    headers: dict[str, str]

    def ask(self, method: str, path: str, body: Any = None) -> httpx.Response:
        more = {} if body is None else {"json": body}
        return self.client.request(method, path, headers=self.headers, **more)

    def an_enrolment_token(self, **said: Any) -> dict[str, Any]:
        answer = self.ask("POST", "/api/enrolment-tokens", {"name": "for the farm", **said})
        assert answer.status_code == 201, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def a_runner(self, *labels: str) -> dict[str, Any]:
        """A runner of this tenant: `runnerId` and `runnerSecret`."""
        made = enrol(self.client, self.an_enrolment_token()["token"], *labels)
        assert made.status_code == 201, made.text
        told: dict[str, Any] = made.json()
        return told


def a_member(state: AppState, client: httpx.Client, account: str, role: Role = Role.ADMIN) -> Member:
    """Somebody of this role, in a tenant that is made when it is not there."""
    secret = API_TOKEN_PREFIX + secrets.token_urlsafe(32)
    now = state.clock()

    def make(tx: Any) -> str:
        tenant_id = ensure_tenant(tx, account, now=now).id
        tx.add(
            ApiToken(
                id=new_id(),
                tenant_id=tenant_id,
                name=f"{role} of {account}",
                token_hash=secret_hash(secret),
                permissions=sorted(permissions_of(role)),
                created_at=now,
                expires_at=now + timedelta(days=400),
            )
        )
        tx.flush()
        return tenant_id

    tenant_id = state.lanes.write_and_wait(make)
    return Member(client, tenant_id, account, {"Authorization": f"Bearer {secret}"})


def the_operator(state: AppState, client: httpx.Client) -> Member:
    return Member(client, "", "", {"Authorization": f"Bearer {state.credentials.admin_token}"})


def enrol(client: httpx.Client, token: str, *labels: str, name: str = "a runner") -> httpx.Response:
    return client.post(
        "/api/runners",
        json={"name": name, "labels": list(labels)},
        headers={"Authorization": f"Bearer {token}"},
    )


def secret_of(runner: dict[str, Any]) -> dict[str, str]:
    return {"Authorization": f"Bearer {runner['runnerSecret']}"}
