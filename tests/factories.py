"""Things for tests to stand on, each made out of the one before: a step, a workflow, a build, a held step.

`Mill` makes them by actions; `Api` makes them over HTTP. Names say what they are: a_build, an_acquired_step.
"""

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import httpx
import pytest
from sqlmodel import Session

from coordinator.actions.acquire_steps import acquire_steps
from coordinator.actions.append_log import Appended, append_log
from coordinator.actions.check_completion import SealedLog
from coordinator.actions.complete_step import Verdict, complete_step, log_to_seal
from coordinator.actions.create_build import BuildRequest, create_build
from coordinator.actions.create_image import create_image
from coordinator.actions.create_project import create_project
from coordinator.actions.create_token import create_token
from coordinator.actions.create_user import create_user
from coordinator.actions.create_workflow import create_workflow
from coordinator.actions.leased_step import LeaseProof
from coordinator.actions.log_in import log_in
from coordinator.actions.register_runner import register_runner
from coordinator.actions.renew_leases import renew_leases
from coordinator.actions.set_member import set_member
from coordinator.actions.start_step import start_step
from coordinator.api.state import AppState
from coordinator.errors import AlreadyExists
from coordinator.passwords import hash_password
from coordinator.rules.access import Audience, Caller
from coordinator.rules.permissions import Role
from coordinator.site import Site
from coordinator.store import accounts, attempts, audit, builds, steps
from coordinator.store.tenants import ensure_tenant
from coordinator.tables import AuditLog, Build
from coordinator.watch import LOOKS
from shared.ids import new_id
from shared.protocol import (
    Acquire,
    AttemptReport,
    Claim,
    Completion,
    Heartbeat,
    Order,
    Phase,
    Registration,
    Start,
    StartAnswer,
)
from tests.fakes import SettableClock

T = TypeVar("T")
ON_SQLITE = pytest.mark.parametrize("database", ["sqlite"], indirect=True)
ON_POSTGRES = pytest.mark.parametrize(
    "database", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)
LOCAL = Caller(actor="local", audience=Audience.USER, address="127.0.0.1")


def a_step(name: str = "test", depends_on: Sequence[str] = (), /, **fields: Any) -> dict[str, Any]:
    """One step of a workflow as an author writes it."""
    return {
        "name": name,
        "imageSlug": "box",
        "dependsOn": list(depends_on),
        "runScript": "echo hello",
        "cacheDirs": [],
        "outputPaths": [],
        **fields,
    }


def a_spec(**graph: Sequence[str]) -> list[dict[str, Any]]:
    """The steps of a workflow by what they depend on: `a_spec(build=[], test=["build"])`."""
    return [a_step(name, behind) for name, behind in (graph or {"test": ()}).items()]


def together(*calls: Callable[[], T]) -> list[T | Exception]:
    """Begin all calls at the same moment, each in its own thread; what each returned or raised."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], T]) -> T | Exception:
        barrier.wait(timeout=30)
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begin, calls))


@dataclass(frozen=True)
class MadeBuild:
    """A build and the ids of its steps by name."""

    id: str
    project_id: str
    workflow_id: str
    steps: dict[str, str]


PASSWORD = "correct horse battery staple"


@cache
def _hashed() -> str:
    return hash_password(PASSWORD)


@dataclass(frozen=True)
class MadeUser:
    """A user whose password is `PASSWORD`."""

    id: str
    email: str


@dataclass(frozen=True)
class MadeRunner:
    """A registered runner with its secret and the session of its process."""

    id: str
    secret: str
    session: str

    @property
    def caller(self) -> Caller:
        return Caller(
            actor=f"runner:{self.id}", audience=Audience.RUNNER, address="127.0.0.1", runner_id=self.id
        )


@dataclass(frozen=True)
class Held:
    """A step that a runner has acquired."""

    claim: Claim
    runner: MadeRunner

    @property
    def step_id(self) -> str:
        return self.claim.step_id

    @property
    def proof(self) -> LeaseProof:
        return LeaseProof(self.claim.attempt, self.claim.lease)

    def report(self, phase: Phase = Phase.RUNNING) -> AttemptReport:
        return AttemptReport(
            step_id=self.step_id, attempt=self.claim.attempt, lease=self.claim.lease, phase=phase
        )


class Mill:
    """A coordinator's actions in hand, each in a transaction of its own at the time of the set clock."""

    def __init__(self, state: AppState, clock: SettableClock) -> None:
        self.state = state
        self.clock = clock

    @property
    def site(self) -> Site:
        return self.state.site

    def tx(self, action: Callable[..., T], /, *args: Any, **named: Any) -> T:
        return self.state.lanes.write_and_wait(lambda tx: action(tx, *args, **named))

    def now(self, action: Callable[..., T], /, *args: Any, **named: Any) -> T:
        return self.tx(action, *args, now=self.clock(), **named)

    # What users make

    def a_project(self, account: str = "acme") -> str:
        project, _ = self.now(create_project, LOCAL, account=account, name="a project")
        return project.id

    def an_image(self, slug: str = "box", image_url: str = "busybox:1") -> None:
        """There for every tenant from now on, if it was not before."""
        try:
            self.now(create_image, self.site, LOCAL, slug=slug, image_url=image_url, public=True)
        except AlreadyExists:
            return

    def a_workflow(self, project_id: str, spec: list[dict[str, Any]]) -> str:
        self.an_image()
        return self.now(create_workflow, self.site, LOCAL, project_id, name="a workflow", steps=spec).id

    def a_build(
        self, spec: list[dict[str, Any]] | None = None, *, project_id: str | None = None, **request: Any
    ) -> MadeBuild:
        project_id = project_id or self.a_project()
        workflow_id = self.a_workflow(project_id, spec or a_spec())
        return self.another_build(project_id, workflow_id, **request)

    def another_build(self, project_id: str, workflow_id: str, **request: Any) -> MadeBuild:
        wish = BuildRequest(workflow_id, **request)
        build = self.now(create_build, self.site, LOCAL, project_id, wish)
        ids = {row.name: row.id for row in self.tx(steps.list_steps, build.id)}
        return MadeBuild(build.id, project_id, workflow_id, ids)

    # Who there is

    def a_tenant(self, account: str = "acme") -> str:
        """The id of the tenant of this account, made where it is not there."""
        return self.now(ensure_tenant, account).id

    def a_user(self, email: str = "ann@acme.test", *, is_admin: bool = False, **roles: str) -> "MadeUser":
        """A user with `PASSWORD`; `acme="owner"` makes her the owner of the tenant of that account."""
        user = self.now(create_user, LOCAL, email=email, name="", password_hash=_hashed(), is_admin=is_admin)
        for account, role in roles.items():
            self.now(set_member, LOCAL, self.a_tenant(account), user.id, Role(role))
        self.state.rights.have_changed()
        return MadeUser(user.id, email)

    def a_login(self, user: "MadeUser") -> dict[str, str]:
        """The header of a user who has logged in."""
        stored = self.tx(accounts.get_user, user.id).password_hash
        opened = self.now(log_in, self.site, user.id, stored, address="127.0.0.1")
        return {"Authorization": f"Bearer {opened.token}"}

    def a_member(self, account: str = "acme", role: str = "owner") -> dict[str, str]:
        """The headers of a new user of this role who has logged in and speaks of that tenant."""
        user = self.a_user(f"{new_id()}@acme.test", **{account: role})
        return {**self.a_login(user), "X-Tenant-ID": self.a_tenant(account)}

    def an_api_token(self, account: str = "acme", *permissions: str) -> dict[str, str]:
        """The header of a program with a token for nobody in particular."""
        caller = replace(LOCAL, tenant_id=self.a_tenant(account))
        _, secret = self.now(
            create_token, caller, name="a token", permissions=permissions, lifetime=timedelta(days=1)
        )
        return {"Authorization": f"Bearer {secret}"}

    @property
    def operator(self) -> dict[str, str]:
        """The header of the operator."""
        return {"Authorization": f"Bearer {self.state.credentials.admin_token}"}

    # What runners do

    def a_runner(self, *labels: str) -> MadeRunner:
        made = self.now(register_runner, LOCAL, Registration(name="a runner", labels=list(labels)))
        return MadeRunner(made.runner_id, made.runner_secret, new_id())

    def acquire(self, runner: MadeRunner, *, slots: int = 1, **said: Any) -> list[Held]:
        wish = {"request_id": new_id(), "session": runner.session, **said}
        claims = self.now(acquire_steps, self.site, runner.caller, Acquire(slots=slots, **wish))
        return [Held(claim, runner) for claim in claims]

    def an_acquired_step(
        self, spec: list[dict[str, Any]] | None = None, runner: MadeRunner | None = None
    ) -> Held:
        self.a_build(spec)
        return self.acquire(runner or self.a_runner())[0]

    def a_running_step(
        self, spec: list[dict[str, Any]] | None = None, runner: MadeRunner | None = None
    ) -> Held:
        held = self.an_acquired_step(spec, runner)
        self.start(held)
        return held

    def start(self, held: Held) -> StartAnswer:
        return self.now(start_step, self.site, held.runner.caller, held.step_id, held.proof, Start())

    def heartbeat(self, runner: MadeRunner, *held: Held, **said: Any) -> list[Order]:
        reports = [one.report() for one in held]
        words = Heartbeat(session=runner.session, attempts=reports, **said)
        return self.now(renew_leases, self.site, runner.caller, words).attempts

    def append(self, held: Held, offset: int, data: bytes) -> Appended:
        return self.now(
            append_log, self.site, held.runner.caller, held.step_id, held.proof, offset=offset, data=data
        )

    def complete(self, held: Held, status: str = "success", **said: Any) -> Verdict:
        """As the route does it: the log is sealed first, then the completion is written.

        Unless told otherwise the runner names the size of its log, as ours does.
        """
        step = (self.site, held.runner.caller, held.step_id, held.proof)
        size, path = self.tx(log_to_seal, *step)
        if not said.keys() & {"logSize", "log_size", "logGap", "log_gap"}:
            said["logSize"] = size
        sealed = SealedLog(size, self.site.logs.seal(path, size))
        completion = Completion.model_validate_json(json.dumps({"status": status, **said}))
        return self.now(complete_step, *step, completion, sealed)

    def expire(self) -> int:
        """What the coordinator's watch does each second."""
        return sum(self.now(action, self.site) for action in LOOKS)

    # What can be seen

    def step(self, step_id: str) -> Any:
        return self.tx(steps.get_step, step_id)

    def states(self, build: MadeBuild) -> dict[str, str]:
        return {row.name: str(row.state) for row in self.tx(steps.list_steps, build.id)}

    def build(self, build_id: str) -> Build:
        return self.tx(builds.get_build, build_id)

    def attempts(self, step_id: str) -> list[Any]:
        return self.tx(attempts.list_attempts, [step_id]).get(step_id, [])

    def audited(self, action: str | None = None) -> list[AuditLog]:
        """The trail, oldest first."""

        def look(tx: Session) -> list[AuditLog]:
            rows, _ = audit.list_records(tx, LOCAL, project_id=None, action=action, limit=1000, offset=0)
            return rows[::-1]

        return self.tx(look)


class Api:
    """The same over HTTP: what is made comes back as the JSON that was answered."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    def post(self, path: str, body: Any = None, status: int = 201, **more: Any) -> Any:
        if body is not None:
            more["json"] = body
        answer = self.client.post(path, **more)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    def get(self, path: str, status: int = 200, **more: Any) -> Any:
        answer = self.client.get(path, **more)
        assert answer.status_code == status, answer.text
        return answer.json()

    def a_project(self, account: str = "acme") -> dict[str, Any]:
        made: dict[str, Any] = self.post("/api/projects", {"accountId": account, "name": "a project"})
        return made

    def an_image(self, slug: str = "box", image_url: str = "busybox:1") -> dict[str, Any]:
        for image in self.get("/api/docker-images"):
            if image["slug"] == slug:
                found: dict[str, Any] = image
                return found
        made: dict[str, Any] = self.post("/api/docker-images", {"slug": slug, "imageUrl": image_url})
        return made

    def a_workflow(
        self, spec: list[dict[str, Any]] | None = None, project_id: str | None = None
    ) -> dict[str, Any]:
        self.an_image()
        project_id = project_id or self.a_project()["id"]
        body = {"name": "a workflow", "steps": spec or a_spec()}
        made: dict[str, Any] = self.post(f"/api/projects/{project_id}/workflows", body)
        return made

    def a_build(self, spec: list[dict[str, Any]] | None = None, **request: Any) -> dict[str, Any]:
        """The build with its steps, as it can be read back."""
        workflow = self.a_workflow(spec)
        body = {"workflowId": workflow["id"], **request}
        made = self.post(f"/api/projects/{workflow['projectId']}/builds", body)
        return self.build(made["id"])

    def build(self, build_id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.get(f"/api/builds/{build_id}")
        return shown

    def a_runner(self, *labels: str) -> dict[str, str]:
        """The header by which a new runner is known."""
        made = self.post("/api/runners", {"name": "a runner", "labels": list(labels)})
        return {"Authorization": f"Bearer {made['runnerSecret']}"}

    def acquire(self, runner: dict[str, str], slots: int = 1, **said: Any) -> list[dict[str, Any]]:
        wish = {"requestId": new_id(), "session": "the-session", "slots": slots, **said}
        answer = self.client.post("/api/runner/acquire", json=wish, headers=runner)
        assert answer.status_code in (200, 204), answer.text
        claims: list[dict[str, Any]] = answer.json()["claims"] if answer.status_code == 200 else []
        return claims

    def an_acquired_step(
        self, spec: list[dict[str, Any]] | None = None, runner: dict[str, str] | None = None
    ) -> "HeldOverHttp":
        self.a_build(spec)
        runner = runner or self.a_runner()
        return HeldOverHttp(self.client, self.acquire(runner)[0], runner)

    def a_running_step(self, spec: list[dict[str, Any]] | None = None) -> "HeldOverHttp":
        held = self.an_acquired_step(spec)
        assert held.post("start", {}).status_code == 200
        return held


@dataclass(frozen=True)
class HeldOverHttp:
    """An acquired step and the headers that prove it."""

    client: httpx.Client
    claim: dict[str, Any]
    runner: dict[str, str]

    @property
    def step_id(self) -> str:
        return str(self.claim["stepId"])

    @property
    def headers(self) -> dict[str, str]:
        proof = {"X-Attempt": str(self.claim["attempt"]), "X-Lease": self.claim["lease"]}
        return {**self.runner, **proof}

    def path(self, verb: str) -> str:
        return f"/api/runner/{self.step_id}/{verb}"

    def post(self, verb: str, body: Any) -> httpx.Response:
        return self.client.post(self.path(verb), json=body, headers=self.headers)

    def complete(self, status: str = "success", **said: Any) -> httpx.Response:
        return self.post("complete", {"status": status, **said})

    def append(self, offset: int | str, data: bytes, **headers: str) -> httpx.Response:
        return self.client.post(
            self.path(f"log?offset={offset}"), content=data, headers={**self.headers, **headers}
        )

    def put_blob(self, sha256: str, data: bytes, **headers: str) -> httpx.Response:
        return self.client.put(
            self.path(f"blobs/{sha256}"), content=data, headers={**self.headers, **headers}
        )
