"""Two tenants that have one of everything, and everybody who could ask for it."""

import hashlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.change_project import change_project
from coordinator.actions.create_enrolment_token import create_enrolment_token
from coordinator.actions.create_image import create_image
from coordinator.actions.create_token import create_token
from coordinator.actions.create_unstarted_build import create_unstarted_build
from coordinator.actions.delete_build import delete_build
from coordinator.actions.delete_expired import delete_expired
from coordinator.actions.delete_project import delete_project
from coordinator.actions.list_artifacts import list_artifacts
from coordinator.actions.register_runner import register_runner
from coordinator.actions.set_secret import set_secret
from coordinator.actions.store_blob import store_blob
from coordinator.rules.access import Audience, Caller
from coordinator.rules.permissions import Role, permissions_of
from coordinator.rules.retention import Part
from shared.ids import new_id
from shared.protocol import Registration
from tests.factories import LOCAL, Held, MadeRunner, Mill, a_step

DAY = timedelta(days=1)
_NUMBERS = itertools.count(1)

Ids = dict[str, str]


@dataclass
class Estate:
    """What one tenant has: the id of a thing of each kind, and ways to make another one."""

    mill: Mill
    account: str
    tenant: str
    ids: Ids = field(default_factory=dict)
    gone: dict[str, list[str]] = field(default_factory=dict)
    held: Held | None = None
    runner: MadeRunner | None = None

    @property
    def data(self) -> bytes:
        """What its steps make."""
        return f"of {self.account}\n".encode()

    @property
    def local(self) -> Caller:
        return replace(LOCAL, tenant_id=self.tenant)

    def another(self, kind: str, for_user: str | None = None) -> Ids:
        """One more thing of this kind, with what else is named beside it."""
        made: Ids = getattr(self, f"another_{kind}")() if kind != "token" else self.another_token(for_user)
        return made

    def another_project(self) -> Ids:
        project = self.mill.a_project(self.account)
        workflow = self.mill.a_workflow(project, [a_step("test")])
        settled = {"repo_url": "https://git.example/o/r", "default_workflow_id": workflow}
        self.mill.now(change_project, self.mill.site, LOCAL, project, settled)
        secret = {"name": "TOKEN", "value": "not to be told"}
        self.mill.now(set_secret, self.mill.site, LOCAL, project, **secret)
        return {"project": project, "workflow": workflow, "secret": "TOKEN"}

    def another_workflow(self) -> Ids:
        return {"workflow": self.mill.a_workflow(self.ids["project"], [a_step("test")])}

    def another_secret(self) -> Ids:
        name = f"TOKEN_{next(_NUMBERS)}"
        about = {"name": name, "value": "not to be told"}
        self.mill.now(set_secret, self.mill.site, LOCAL, self.ids["project"], **about)
        return {"secret": name}

    def another_image(self) -> Ids:
        about = {"slug": f"box-{next(_NUMBERS)}", "image_url": "busybox:1", "public": False}
        return {"image": self.mill.now(create_image, self.mill.site, self.local, **about).id}

    def another_token(self, for_user: str | None = None) -> Ids:
        maker = replace(self.local, user_id=for_user)
        about: dict[str, Any] = {"name": "t", "permissions": ["build:read"], "lifetime": DAY}
        return {"token": self.mill.now(create_token, maker, **about)[0].id}

    def another_enrolment(self) -> Ids:
        return {"enrolment": self.an_enrolment_token()[0]}

    def an_enrolment_token(self) -> tuple[str, str]:
        about: dict[str, Any] = {"name": "e", "labels": None, "max_uses": 100, "lifetime": DAY}
        token, secret, _ = self.mill.now(create_enrolment_token, self.local, shared=False, **about)
        return token.id, secret

    def another_user(self) -> Ids:
        return {"user": self.mill.a_user(f"{new_id()}@{self.account}.test", **{self.account: "viewer"}).id}

    def another_runner(self) -> Ids:
        return {"runner": self.a_runner().id}

    def a_runner(self) -> MadeRunner:
        token_id, _ = self.an_enrolment_token()
        machine = Caller(
            actor=f"enrolment:{token_id}",
            audience=Audience.ENROLMENT,
            tenant_id=self.tenant,
            enrolment_token_id=token_id,
        )
        made = self.mill.now(register_runner, machine, Registration(name="a runner"))
        return MadeRunner(made.runner_id, made.runner_secret, new_id())

    def another_build(self) -> Ids:
        """One that waits for a runner."""
        made = self.mill.another_build(self.ids["project"], self.ids["workflow"])
        return {"build": made.id, "step": made.steps["test"]}

    def another_created_build(self) -> Ids:
        about = {"branch": "main", "commit": None}
        made = self.mill.now(create_unstarted_build, self.mill.site, LOCAL, self.ids["project"], **about)
        return {"build": made.id}

    def another_cancelled_build(self) -> Ids:
        made = self.another_build()
        cancelled = self.mill.now(cancel_build, self.mill.site, LOCAL, made["build"])
        return {**made, "cancel": cancelled.cancel_id or ""}

    def a_held_step(self, *, begun: bool = True) -> Held:
        made = self.another_build()
        runner = self.runner or self.a_runner()
        while True:  # others of the tenant may have waited longer
            (held,) = self.mill.acquire(runner)
            if held.claim.build_id == made["build"]:
                break
        if begun:
            self.mill.start(held)
        return held

    def fill(self) -> None:
        """One of everything."""
        for kind in ("project", "image", "token", "enrolment", "user", "cancelled_build"):
            self.ids |= self.another(kind)
        self.runner = self.a_runner()
        self.ids["runner"] = self.runner.id
        self._have_a_build_with_an_artifact()
        self._have_what_is_gone()

    def _have_a_build_with_an_artifact(self) -> None:
        """Its first step has handed a file on, the second is held by the tenant's runner."""
        spec = [a_step("make", outputPaths=["out"]), a_step("use", ["make"])]
        self.ids |= self._build_with_an_artifact(spec)
        (self.held,) = self.mill.acquire(self.runner or self.a_runner())
        self.mill.start(self.held)
        self.ids["step"] = self.held.step_id

    def _build_with_an_artifact(self, spec: list[dict[str, Any]]) -> Ids:
        made = self.mill.a_build(spec, project_id=self.ids["project"])
        (held,) = self.mill.acquire(self.runner or self.a_runner())
        self.mill.start(held)
        incoming, sha256 = self.mill.site.blobs.incoming(), self.ids["blob"]
        incoming.write(self.data)
        incoming.commit(sha256)
        step = (self.mill.site, held.runner.caller, held.step_id, held.proof, sha256)
        self.mill.now(store_blob, *step, size=len(self.data))
        entry = {"path": "out", "type": "file", "size": len(self.data), "sha256": sha256}
        self.mill.complete(held, artifacts=[entry])
        (artifact,) = self.mill.tx(list_artifacts, LOCAL, made.id)
        return {"build": made.id, "step": held.step_id, "artifact": artifact.id}

    def _have_what_is_gone(self) -> None:
        """A deleted project; a build that was deleted a moment ago, and one of which a tombstone is left."""
        project = self.another_project()["project"]
        self.mill.now(delete_project, LOCAL, project)
        deleted = self.another_cancelled_build()
        buried = self._build_with_an_artifact([a_step("make", outputPaths=["out"])])
        cancelled = self.another_cancelled_build()
        for made in (deleted, buried, cancelled):
            self.mill.now(delete_build, LOCAL, made["build"])
        for made in (buried, cancelled):
            for part in (Part.ARTIFACTS, Part.LOGS, Part.BUILD):
                self.mill.now(delete_expired, made["build"], part)
        self.gone = {"project": [project]}
        for made in (deleted, buried, cancelled):
            for kind, its_id in made.items():
                self.gone.setdefault(kind, []).append(its_id)


@dataclass(frozen=True)
class Asker:
    """Somebody who asks: the credential, and what it may where; None in `may` is everything, everywhere.

    `about` is the tenant that the header names; a runner has an estate instead of permissions.
    """

    name: str
    headers: Mapping[str, str]
    may: Mapping[str, frozenset[str]] | None = field(default_factory=dict)
    about: str | None = None
    user: str | None = None
    runner_of: str | None = None
    enrols: bool = False

    @property
    def is_user(self) -> bool:
        return self.may is None or bool(self.may)

    @property
    def is_operator(self) -> bool:
        return self.may is None


def askers(mill: Mill, mine: Estate, theirs: Estate) -> list[Asker]:
    """Everybody there is, as seen from the tenant whose things are asked for."""
    third = mill.a_tenant("third")
    found = [
        _member(mill, mine, str(role), header=header)
        for role, header in [*((role, False) for role in Role), (Role.OWNER, True)]
    ]
    split = mill.a_user("split@acme.test", **{mine.account: "viewer", "third": "owner"})
    both = {mine.tenant: permissions_of("viewer"), third: permissions_of("owner")}
    found.append(Asker("viewer here, owner elsewhere", mill.a_login(split), both, user=split.id))
    few = ("build:read", "project:read", "image:list")
    program = mill.an_api_token(mine.account, *few)
    found.append(Asker("program", program, {mine.tenant: frozenset(few)}))
    found += [
        Asker("operator", mill.operator, None),
        Asker("operator in this tenant", {**mill.operator, "X-Tenant-ID": mine.tenant}, None, mine.tenant),
        _runner("its runner", mine),
        _runner("runner of another tenant", theirs),
        Asker("enrolling machine", _bearer(mine.an_enrolment_token()[1]), enrols=True),
        Asker("nobody", {}),
        Asker("stranger", _bearer("a-guess")),
    ]
    return found


def _member(mill: Mill, mine: Estate, role: str, *, header: bool) -> Asker:
    user = mill.a_user(f"{new_id()}@acme.test", **{mine.account: role})
    headers = mill.a_login(user) | ({"X-Tenant-ID": mine.tenant} if header else {})
    may = {mine.tenant: permissions_of(role)}
    name = f"{role} with the header" if header else role
    return Asker(name, headers, may, mine.tenant if header else None, user.id)


def _runner(name: str, estate: Estate) -> Asker:
    assert estate.runner is not None
    return Asker(name, _bearer(estate.runner.secret), runner_of=estate.tenant)


def _bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def an_estate(mill: Mill, account: str) -> Estate:
    estate = Estate(mill, account, mill.a_tenant(account))
    digest = hashlib.sha256(estate.data).hexdigest()
    estate.ids = {"tenant": estate.tenant, "account": account, "blob": digest}
    estate.fill()
    return estate


def nothing_of(kind: str) -> str:
    """An id that nothing has, of the form that ids of this kind have."""
    special: dict[str, Callable[[], str]] = {
        "blob": lambda: hashlib.sha256(new_id().encode()).hexdigest(),
        "account": lambda: f"account-{next(_NUMBERS):09}",
    }
    return special.get(kind, new_id)()
