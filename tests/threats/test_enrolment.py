"""Group I, who becomes a runner, what it may claim, and what is left of one that was revoked."""

from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import pytest

from coordinator.api.state import AppState
from coordinator.rules.permissions import Role
from coordinator.settings import Settings
from tests.coordinator.enrolling import Member, a_member, enrol, secret_of
from tests.factories import HeldOverHttp, Mill, a_step, together
from tests.fakes import SettableClock


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"auth": "token"})


@pytest.fixture
def admin(coordinator: AppState, client: httpx.Client) -> Member:
    return a_member(coordinator, client, "acme")


def count_runners(admin: Member) -> int:
    return len(admin.ask("GET", "/api/runners").json())


# I10: enrolment tokens


@pytest.mark.threat("I10")
def test_of_fifty_machines_with_one_token_for_one_exactly_one_is_let_in(
    admin: Member, client: httpx.Client, mill: Mill
) -> None:
    token = admin.an_enrolment_token()["token"]

    answers = together(*[partial(enrol, client, token)] * 50)

    statuses = sorted(answer.status_code for answer in answers if isinstance(answer, httpx.Response))
    assert statuses == [201] + [401] * 49
    assert count_runners(admin) == 1
    assert len(mill.audited("runner.registered")) == 1
    (listed,) = admin.ask("GET", "/api/enrolment-tokens").json()
    assert (listed["state"], listed["uses"]) == ("used_up", 1)


@pytest.mark.threat("I10")
def test_a_counted_token_lets_in_as_many_as_it_was_made_for(admin: Member, client: httpx.Client) -> None:
    token = admin.an_enrolment_token(maxUses=3)["token"]

    answers = together(*[partial(enrol, client, token)] * 10)

    statuses = sorted(answer.status_code for answer in answers if isinstance(answer, httpx.Response))
    assert statuses == [201] * 3 + [401] * 7
    assert count_runners(admin) == 3


@pytest.mark.threat("I10")
def test_a_token_that_has_expired_or_was_revoked_lets_nobody_in(
    admin: Member, client: httpx.Client, clock: SettableClock
) -> None:
    revoked = admin.an_enrolment_token(maxUses=9)
    brief = admin.an_enrolment_token(maxUses=9, expiresInSeconds=60)
    assert enrol(client, revoked["token"]).status_code == 201

    admin.ask("DELETE", f"/api/enrolment-tokens/{revoked['id']}")
    clock.advance(60)

    for made in (revoked, brief):
        assert enrol(client, made["token"]).status_code == 401
    assert count_runners(admin) == 1


@pytest.mark.threat("I10")
def test_a_token_cannot_be_guessed_from_another_and_each_try_is_written_down(
    admin: Member, client: httpx.Client, mill: Mill, clock: SettableClock
) -> None:
    token = admin.an_enrolment_token(maxUses=9)["token"]
    tries = [token[:-1], token + "A", token.swapcase(), "bme_", "bme_" + "A" * 43, token.removeprefix("bme_")]

    for guess in tries:
        assert enrol(client, guess).status_code == 401
        clock.advance(2)

    assert count_runners(admin) == 0
    assert len(mill.audited("access.denied")) == len(tries)


@pytest.mark.threat("I10")
def test_no_list_and_no_trail_holds_a_token(admin: Member, client: httpx.Client, mill: Mill) -> None:
    token = admin.an_enrolment_token(maxUses=2)["token"]
    runner = enrol(client, token).json()

    told = admin.ask("GET", "/api/enrolment-tokens").text + admin.ask("GET", "/api/runners").text
    told += "".join(str(row.details) for row in mill.audited())
    assert token not in told and runner["runnerSecret"] not in told


# I09: labels and tenants are fixed at enrolment


@pytest.mark.threat("I09")
def test_a_runner_never_gets_labels_that_its_token_does_not_give(
    admin: Member, client: httpx.Client, mill: Mill
) -> None:
    mill.a_build([a_step("test", labels=["privileged"])], project_id=mill.a_project("acme"))
    token = admin.an_enrolment_token(labels=["gpu"], maxUses=2)["token"]

    assert enrol(client, token, "gpu", "privileged").status_code == 403
    runner = enrol(client, token, "gpu").json()
    said = {"requestId": "request-1", "session": "session-1", "labels": ["gpu", "privileged"], "slots": 9}
    answer = client.post("/api/runner/acquire", json=said, headers=secret_of(runner))

    assert answer.status_code == 204
    (shown,) = admin.ask("GET", "/api/runners").json()
    assert shown["labels"] == ["gpu"]


@pytest.mark.threat("I09")
@pytest.mark.parametrize("widening", [{"tenantId": "x"}, {"accountId": "other"}, {"shared": True}])
def test_a_runner_that_says_whose_it_is_is_refused(
    admin: Member, client: httpx.Client, widening: dict[str, Any]
) -> None:
    token = admin.an_enrolment_token()["token"]
    headers = {"Authorization": f"Bearer {token}"}

    refused = client.post("/api/runners", json={"name": "r", **widening}, headers=headers)

    assert refused.status_code == 400
    said = {"requestId": "request-1", "session": "session-1", **widening}
    runner = secret_of(enrol(client, token).json())
    assert client.post("/api/runner/acquire", json=said, headers=runner).status_code == 400


@pytest.mark.threat("I09")
def test_a_header_does_not_move_a_runner_into_another_tenant(
    admin: Member, coordinator: AppState, client: httpx.Client, mill: Mill
) -> None:
    other = a_member(coordinator, client, "other")
    mill.a_build(project_id=mill.a_project("other"))
    runner = secret_of(admin.a_runner())

    said = {"requestId": "request-1", "session": "session-1"}
    headers = {**runner, "X-Tenant-ID": other.tenant_id}

    assert client.post("/api/runner/acquire", json=said, headers=headers).status_code == 204


# I11: a revoked runner


@pytest.mark.threat("I11")
def test_everything_that_a_revoked_runner_says_is_401_and_its_step_goes_to_another(
    admin: Member, client: httpx.Client, mill: Mill, clock: SettableClock
) -> None:
    build = mill.a_build(project_id=mill.a_project("acme"))
    made = admin.a_runner()
    runner = secret_of(made)
    said = {"requestId": "request-1", "session": "session-1"}
    (claim,) = client.post("/api/runner/acquire", json=said, headers=runner).json()["claims"]
    held = HeldOverHttp(client, claim, runner)
    assert held.post("start", {}).status_code == 200

    assert admin.ask("DELETE", f"/api/runners/{made['runnerId']}").status_code == 204

    answers = [
        client.post("/api/runner/heartbeat", json={"session": "session-1"}, headers=runner),
        client.post("/api/runner/acquire", json=said, headers=runner),
        client.post("/api/runner/resume", json={"session": "session-1"}, headers=runner),
        client.post("/api/runner/rotate", json={"secretSha256": "0" * 64}, headers=runner),
        client.get(f"/api/runner/{held.step_id}", headers=held.headers),
        held.append(0, b"from the dead"),
        held.put_blob("0" * 64, b"from the dead"),
        held.post("release", {}),
        held.complete(),
    ]
    assert [(one.status_code, one.json()["code"]) for one in answers] == [(401, "revoked")] * len(answers)
    assert mill.step(held.step_id).state == "ready"
    clock.advance(10)
    (again,) = mill.acquire(mill.a_runner())
    mill.start(again)
    mill.complete(again)
    assert mill.build(build.id).state == "succeeded"


# I14: what a runner can read


@pytest.mark.threat("I14")
def test_a_runner_reads_nothing_that_users_read_and_lists_nothing(
    admin: Member, client: httpx.Client, mill: Mill
) -> None:
    project = mill.a_project("acme")
    build = mill.a_build(project_id=project)
    runner = secret_of(admin.a_runner())
    thief = {**runner, "X-Attempt": "1", "X-Lease": "x" * 43}

    for path in (
        "/api/runners",
        "/api/enrolment-tokens",
        "/api/projects?accountId=acme",
        f"/api/builds/{build.id}",
        f"/api/projects/{project}/secrets",
        "/api/audit-logs",
    ):
        assert client.get(path, headers=runner).status_code == 401, path
    for step_id in (build.steps["test"], "nothing-of-the-kind"):
        assert client.get(f"/api/runner/{step_id}", headers=thief).status_code in (404, 409)


@pytest.mark.threat("I14")
def test_who_may_only_look_at_builds_makes_no_runner(coordinator: AppState, client: httpx.Client) -> None:
    viewer = a_member(coordinator, client, "acme", Role.VIEWER)

    assert viewer.ask("POST", "/api/enrolment-tokens", {"name": "x"}).status_code == 403
    assert viewer.ask("POST", "/api/runners", {"name": "x"}).status_code == 401
    assert viewer.ask("GET", "/api/runners").status_code == 403
    assert replace(viewer, headers={}).ask("POST", "/api/runners", {"name": "x"}).status_code == 401
