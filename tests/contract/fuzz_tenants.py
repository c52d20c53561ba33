"""A tenant for the fuzzer that has one of everything: made over HTTP, with its own word in every name."""

import hashlib
import re
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from coordinator.rules.permissions import GRANTABLE, Role
from shared.ids import new_id
from tests.factories import HeldOverHttp, a_step

PASSWORD = "correct horse battery staple"
# What no other row shares by chance: ids, digests and long random texts.
_TELLING = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{40,64}")
# Rows that change by themselves, or with what somebody else does.
_RESTLESS = {"audit_logs", "clock_marks", "login_counts", "runners"}

Row = tuple[str, tuple[object, ...]]


@dataclass
class FuzzTenant:
    """What there is to be named, and what opens which door.

    `values` are by the parameter of a query or header, or by the word that stands before one in a path.
    """

    account: str
    word: str
    id: str = ""
    values: dict[str, list[str]] = field(default_factory=dict)
    credentials: dict[str, str] = field(default_factory=dict)
    told_once: list[str] = field(default_factory=list)

    def also(self, name: str, *values: str) -> None:
        self.values.setdefault(name, []).extend(values)


class Filling:
    """The operator at work for one tenant."""

    def __init__(self, client: httpx.Client, account: str) -> None:
        self.client = client
        self.tenant = FuzzTenant(account, f"word{secrets.token_hex(8)}")

    def fill(self) -> FuzzTenant:
        tenant = self.tenant
        project = self._made("/api/projects", {"accountId": tenant.account, "name": tenant.word})["id"]
        [known] = self._got("/api/tenants", account=tenant.account)
        tenant.id = known["id"]
        self._settle_project(project)
        self._build(project, self._workflow(project))
        self._machines_at_work()
        self._members_and_programs()
        tenant.also("header.X-Tenant-ID", tenant.id)
        tenant.also("query.accountId", tenant.account)
        tenant.also("query.projectId", project)
        tenant.also("query.project_id", project)
        tenant.also("projects", project)
        tenant.also("tenants", tenant.id)
        return tenant

    # What it has

    def _settle_project(self, project: str) -> None:
        word = self.tenant.word
        self._sent("PATCH", f"/api/projects/{project}", {"repoUrl": f"https://git.example/{word}/name"})
        name = f"NAME_{word.upper()}"
        self._sent("PUT", f"/api/projects/{project}/secrets/{name}", {"value": f"value {word}"})
        self.tenant.also("secrets", name)
        image = {"slug": f"box-{word}", "imageUrl": "alpine", "public": False}
        self.tenant.also("docker-images", self._made("/api/docker-images", image)["id"])

    def _workflow(self, project: str) -> str:
        word = self.tenant.word
        about = {"imageSlug": f"box-{word}", "runScript": f"echo {word}", "env": {"A": word}}
        steps = [
            a_step(f"make {word}", outputPaths=["out"], **about),
            a_step("use", [f"make {word}"], **about),
        ]
        made: str = self._made(f"/api/projects/{project}/workflows", {"name": word, "steps": steps})["id"]
        self._sent("PATCH", f"/api/projects/{project}", {"defaultWorkflowId": made})
        self.tenant.also("workflows", made)
        return made

    def _build(self, project: str, workflow: str) -> None:
        """One that waits, one that was cancelled, and some that were never started."""
        tenant = self.tenant
        wish = {"workflowId": workflow, "branch": tenant.word, "commitMessage": f"for {tenant.word}"}
        builds = [self._made(f"/api/projects/{project}/builds", wish)["id"] for _ in range(3)]
        for build in builds:
            steps = [step["id"] for step in self._got(f"/api/builds/{build}")["steps"]]
            tenant.also("builds", build)
            tenant.also("steps", *steps)
            tenant.also("runner", *steps)  # whose paths go on with a step
        cancelled = self._sent("POST", f"/api/builds/{builds[-1]}/cancel")["cancelId"]
        unstarted = {"project_id": project, "git_branch": tenant.word}
        tenant.also("builds", *(self._made("/api/v1/builds", unstarted)["id"] for _ in range(2)))
        tenant.also("cancels", cancelled)

    def _machines_at_work(self) -> None:
        """A machine has made the first step of a build, with a log and a file."""
        tenant = self.tenant
        for number in range(2):
            about = {"name": f"token {tenant.word}", "maxUses": 10_000}
            enrolment = self._made("/api/enrolment-tokens", about)
            machine = {"Authorization": f"Bearer {enrolment['token']}"}
            name = {"name": f"machine {tenant.word}"}
            runner = self._sent("POST", "/api/runners", name, headers=machine)
            tenant.told_once += [enrolment["token"], runner["runnerSecret"]]
            if number == 0:  # these work, and the others may be revoked
                tenant.credentials |= {"enrolment": enrolment["token"], "runner": runner["runnerSecret"]}
                self._complete_a_step({"Authorization": f"Bearer {runner['runnerSecret']}"})
            else:
                tenant.also("enrolment-tokens", enrolment["id"])
                tenant.also("runners", runner["runnerId"])

    def _complete_a_step(self, runner: dict[str, str]) -> None:
        wish = {"requestId": new_id(), "session": new_id(), "slots": 1}
        (claim,) = self._sent("POST", "/api/runner/acquire", wish, headers=runner)["claims"]
        held = HeldOverHttp(self.client, claim, runner)
        data = f"of {self.tenant.word}\n".encode()
        digest = hashlib.sha256(data).hexdigest()
        out = {"path": "out", "type": "file", "size": len(data), "sha256": digest}
        for answer in (
            held.post("start", {}),
            held.append(0, data),
            held.put_blob(digest, data),
            held.complete(logSize=len(data), artifacts=[out]),
        ):
            answer.raise_for_status()
        (artifact,) = self._got(f"/api/builds/{claim['buildId']}/artifacts")
        self.tenant.also("artifacts", artifact["id"])
        self.tenant.also("blobs", digest)

    def _members_and_programs(self) -> None:
        tenant = self.tenant
        for role in Role:
            email = f"{role}@{tenant.word}.example"
            user = self._made("/api/users", {"email": email, "name": tenant.word, "password": PASSWORD})
            self._sent("PUT", f"/api/tenants/{tenant.id}/members/{user['id']}", {"role": str(role)})
            tenant.credentials[str(role)] = self._logged_in(email)
        spare = self._made("/api/users", {"email": f"spare@{tenant.word}.example", "password": PASSWORD})
        self._sent("PUT", f"/api/tenants/{tenant.id}/members/{spare['id']}", {"role": "viewer"})
        tenant.also("members", spare["id"])
        tenant.also("users", spare["id"])
        about = {"name": f"token {tenant.word}", "permissions": sorted(GRANTABLE)}
        program, other = (self._made("/api/tokens", about) for _ in range(2))
        tenant.credentials["program"] = program["token"]
        tenant.told_once += [program["token"], other["token"]]
        tenant.also("tokens", other["id"])

    def _logged_in(self, email: str) -> str:
        login = {"email": email, "password": PASSWORD}
        opened = self._sent("POST", "/api/v1/auth/login", login, headers={"Authorization": ""})
        self.tenant.told_once += [opened["token"], opened["refresh_token"]]
        token: str = opened["token"]
        return token

    # How it comes to be

    def _made(self, path: str, body: Any) -> Any:
        return self._sent("POST", path, body)

    def _got(self, path: str, **query: str) -> Any:
        return self._read(self.client.get(path, params=query, headers=self._of_tenant()))

    def _sent(self, method: str, path: str, body: Any = None, *, headers: Any = None) -> Any:
        headers = self._of_tenant() if headers is None else headers
        return self._read(self.client.request(method, path, json=body, headers=headers))

    def _of_tenant(self) -> dict[str, str]:
        return {"X-Tenant-ID": self.tenant.id} if self.tenant.id else {}

    def _read(self, answer: httpx.Response) -> Any:
        if answer.is_error:
            raise RuntimeError(f"{answer.request.url} answered {answer.status_code}: {answer.text[:500]}")
        return answer.json() if answer.content else None


def rows_in(database: Path) -> set[Row]:
    """Every row there is, with the name of its table."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=20)) as connection:
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        return {
            (name, tuple(row))
            for (name,) in tables
            if not name.startswith("sqlite_")
            for row in connection.execute(f'SELECT * FROM "{name}"')
        }


def telling_words(rows: set[Row]) -> set[str]:
    """The ids and digests that stand somewhere in these rows."""
    return {word for _, row in rows for value in row for word in _TELLING.findall(str(value))}


def gone_from(before: set[Row], after: set[Row]) -> Iterator[Row]:
    """Rows that are no longer as they were, but for those which never stay."""
    return (row for row in before - after if row[0] not in _RESTLESS)
