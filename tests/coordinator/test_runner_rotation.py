"""A runner's secret: how it is replaced without ever locking its runner out, and how it ends."""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import httpx
import pytest

from coordinator.actions.cancel_build import cancel_build
from coordinator.actions.revoke_runner import revoke_runner
from coordinator.api.state import AppState
from coordinator.errors import Revoked
from coordinator.rules.permissions import Role
from coordinator.settings import Settings
from shared.ids import new_id
from tests.coordinator.enrolling import Member, a_member, secret_of, the_operator
from tests.factories import LOCAL, Mill, a_step, together


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"auth": "token"})


@pytest.fixture
def admin(coordinator: AppState, client: httpx.Client) -> Member:
    return a_member(coordinator, client, "acme")


@pytest.fixture
def operator(coordinator: AppState, client: httpx.Client) -> Member:
    return the_operator(coordinator, client)


@dataclass(frozen=True)
class Machine:
    """A runner as it speaks, by one of its secrets."""

    client: httpx.Client
    id: str
    secret: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secret}"}

    def beat(self) -> httpx.Response:
        return self.client.post(
            "/api/runner/heartbeat", json={"session": "the-session"}, headers=self.headers
        )

    @property
    def is_asked(self) -> bool:
        return bool(self.beat().json()["rotate"])

    def take(self, secret: str) -> httpx.Response:
        said = {"secretSha256": hashlib.sha256(secret.encode()).hexdigest()}
        return self.client.post("/api/runner/rotate", json=said, headers=self.headers)

    def with_secret(self, secret: str) -> "Machine":
        return replace(self, secret=secret)


@pytest.fixture
def machine(admin: Member, client: httpx.Client) -> Machine:
    made = admin.a_runner()
    return Machine(client, made["runnerId"], made["runnerSecret"])


def a_secret() -> str:
    return secrets.token_urlsafe(32)


def ask_to_rotate(admin: Member, machine: Machine) -> None:
    assert admin.ask("POST", f"/api/runners/{machine.id}/rotate").status_code == 200


def test_a_runner_is_asked_until_it_uses_a_new_secret(admin: Member, machine: Machine, mill: Mill) -> None:
    assert not machine.is_asked
    asked = admin.ask("POST", f"/api/runners/{machine.id}/rotate").json()
    renewed = machine.with_secret(a_secret())

    assert (asked["id"], asked["rotateRequestedAt"]) == (machine.id, "2026-03-01T08:00:00.000Z")
    assert machine.is_asked
    assert machine.take(renewed.secret).status_code == 200
    assert machine.is_asked
    assert not renewed.is_asked

    (shown,) = admin.ask("GET", "/api/runners").json()
    assert "rotateRequestedAt" not in shown
    assert [row.action for row in mill.audited() if "rotat" in row.action] == [
        "runner.rotation_requested",
        "runner.rotated",
    ]


def test_the_old_secret_counts_until_the_new_one_is_used_and_not_a_moment_longer(
    admin: Member, machine: Machine
) -> None:
    ask_to_rotate(admin, machine)
    renewed = machine.with_secret(a_secret())
    machine.take(renewed.secret)

    assert machine.beat().status_code == 200
    assert renewed.beat().status_code == 200
    for _ in range(2):
        assert machine.beat().status_code == 401
        assert machine.take(a_secret()).status_code == 401
    assert renewed.beat().status_code == 200


def test_an_answer_that_was_lost_is_asked_for_again(admin: Member, machine: Machine) -> None:
    ask_to_rotate(admin, machine)
    renewed = machine.with_secret(a_secret())

    answers = [machine.take(renewed.secret) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 200]
    assert machine.beat().status_code == 200
    assert renewed.beat().status_code == 200


def test_a_runner_that_forgot_what_it_made_makes_another(admin: Member, machine: Machine) -> None:
    ask_to_rotate(admin, machine)
    forgotten, renewed = (machine.with_secret(a_secret()) for _ in range(2))
    machine.take(forgotten.secret)

    assert machine.take(renewed.secret).status_code == 200

    assert forgotten.beat().status_code == 401
    assert renewed.beat().status_code == 200
    assert machine.beat().status_code == 401


def test_who_was_not_asked_takes_no_new_secret(admin: Member, machine: Machine) -> None:
    assert machine.take(a_secret()).status_code == 409

    ask_to_rotate(admin, machine)
    renewed = machine.with_secret(a_secret())
    machine.take(renewed.secret)
    renewed.beat()
    assert renewed.take(a_secret()).status_code == 409
    assert renewed.beat().status_code == 200


def test_a_secret_that_somebody_has_is_not_new(
    admin: Member, machine: Machine, coordinator: AppState, client: httpx.Client
) -> None:
    other = a_member(coordinator, client, "other").a_runner()
    ask_to_rotate(admin, machine)

    for taken in (machine.secret, other["runnerSecret"]):
        assert machine.take(taken).status_code == 400
    assert client.post("/api/runner/bye", headers=secret_of(other)).status_code == 200
    assert machine.beat().status_code == 200


@pytest.mark.parametrize("said", [{}, {"secretSha256": "x" * 64}, {"secretSha256": "0" * 64, "secret": "x"}])
def test_what_is_no_digest_is_refused(
    admin: Member, machine: Machine, client: httpx.Client, said: dict[str, Any]
) -> None:
    ask_to_rotate(admin, machine)

    assert client.post("/api/runner/rotate", json=said, headers=machine.headers).status_code == 400
    assert machine.beat().status_code == 200


def test_of_the_first_uses_at_once_none_is_refused(admin: Member, machine: Machine, mill: Mill) -> None:
    ask_to_rotate(admin, machine)
    renewed = machine.with_secret(a_secret())
    machine.take(renewed.secret)

    answers = together(*[renewed.beat] * 8)

    assert [answer.status_code for answer in answers if isinstance(answer, httpx.Response)] == [200] * 8
    assert len(mill.audited("runner.rotated")) == 1


# Who may


@pytest.mark.parametrize(("method", "suffix"), [("POST", "/rotate"), ("DELETE", "")])
def test_only_who_administers_a_runner_touches_it(
    admin: Member,
    operator: Member,
    machine: Machine,
    mill: Mill,
    coordinator: AppState,
    client: httpx.Client,
    method: str,
    suffix: str,
) -> None:
    shared = mill.a_runner()
    stranger = a_member(coordinator, client, "other")
    developer = a_member(coordinator, client, "acme", Role.DEVELOPER)

    def status(member: Member, runner_id: str) -> int:
        return member.ask(method, f"/api/runners/{runner_id}{suffix}").status_code

    assert status(developer, machine.id) == 403
    assert {status(stranger, one) for one in (machine.id, shared.id, new_id())} == {404}
    assert status(admin, shared.id) == 404
    about_acme = replace(operator, headers={**operator.headers, "X-Tenant-ID": admin.tenant_id})
    assert status(about_acme, shared.id) == 404
    assert machine.beat().status_code == 200
    assert status(about_acme, machine.id) in (200, 204)
    assert status(operator, shared.id) in (200, 204)


# The end of a runner


def test_a_revoked_runner_is_told_so_at_once_and_is_gone(admin: Member, machine: Machine, mill: Mill) -> None:
    assert machine.beat().status_code == 200

    assert admin.ask("DELETE", f"/api/runners/{machine.id}").status_code == 204

    answer = machine.beat()
    assert (answer.status_code, answer.json()["code"]) == (401, "revoked")
    assert admin.ask("GET", "/api/runners").json() == []
    assert admin.ask("DELETE", f"/api/runners/{machine.id}").status_code == 404
    assert admin.ask("POST", f"/api/runners/{machine.id}/rotate").status_code == 404
    (record,) = mill.audited("runner.revoked")
    assert record.details == {"runnerId": machine.id, "name": "a runner"}
    assert record.tenant_id == admin.tenant_id


def test_both_secrets_of_a_revoked_runner_end(admin: Member, machine: Machine) -> None:
    ask_to_rotate(admin, machine)
    renewed = machine.with_secret(a_secret())
    machine.take(renewed.secret)

    admin.ask("DELETE", f"/api/runners/{machine.id}")

    assert machine.beat().status_code == renewed.beat().status_code == 401
    assert machine.take(a_secret()).status_code == 401


def revoke(mill: Mill, runner_id: str) -> int:
    return mill.now(revoke_runner, mill.site, LOCAL, runner_id)


def test_what_a_revoked_runner_held_goes_to_others(mill: Mill) -> None:
    runner, other = mill.a_runner(), mill.a_runner()
    running = mill.a_running_step(runner=runner)
    mill.heartbeat(runner, running)
    claimed = mill.an_acquired_step(runner=runner)

    assert revoke(mill, runner.id) == 2

    assert [one.step_id for one in mill.acquire(other, slots=5)] == [claimed.step_id]
    mill.clock.advance(10)
    (again,) = mill.acquire(other, slots=5)
    assert (again.step_id, again.claim.attempt) == (running.step_id, 2)
    lost, current = mill.attempts(running.step_id)
    assert (lost.outcome, lost.reason, current.outcome) == ("lost", "runner_lost", None)
    assert mill.step(claimed.step_id).infra_retries == 0


def test_an_exclusive_step_of_a_revoked_runner_has_failed(mill: Mill) -> None:
    held = mill.a_running_step([a_step("test", exclusive=True)])
    mill.heartbeat(held.runner, held)

    revoke(mill, held.runner.id)

    step = mill.step(held.step_id)
    assert (step.state, step.reason) == ("failed", "runner_lost")
    assert mill.build(held.claim.build_id).state == "failed"


def test_a_cancelled_step_of_a_revoked_runner_ends_as_cancelled(mill: Mill) -> None:
    mill.clock.advance(100)
    held = mill.a_running_step()
    mill.heartbeat(held.runner, held)
    mill.now(cancel_build, mill.site, LOCAL, held.claim.build_id)

    revoke(mill, held.runner.id)
    mill.clock.advance(21)
    mill.expire()

    assert mill.step(held.step_id).state == "cancelled"


def test_a_heartbeat_that_crosses_a_revocation_keeps_nothing(mill: Mill) -> None:
    for _ in range(10):
        runner = mill.a_runner()
        held = mill.a_running_step(runner=runner)
        mill.clock.advance(1)

        beat: Callable[[], Any] = partial(mill.heartbeat, runner, held)
        together(beat, beat, partial(revoke, mill, runner.id), beat)

        step = mill.step(held.step_id)
        assert (step.state, step.runner_id) == ("ready", None)


def test_a_claim_that_crosses_a_revocation_is_given_to_nobody_or_given_back(mill: Mill) -> None:
    for _ in range(10):
        build = mill.a_build()
        runner = mill.a_runner()
        claim: Callable[[], Any] = partial(mill.acquire, runner)

        claimed, _ = together(claim, partial(revoke, mill, runner.id))

        assert isinstance(claimed, Revoked) or mill.step(build.steps["test"]).state == "ready"
        (held,) = mill.acquire(mill.a_runner())
        mill.start(held)
        mill.complete(held)
