"""How machines become runners: tokens that count, expire and are revoked, and what they make of a runner."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from coordinator.api.state import AppState
from coordinator.rules.permissions import Role
from coordinator.settings import Settings
from coordinator.store.prepared import _Compiled
from shared.ids import new_id
from tests.coordinator.enrolling import Member, a_member, enrol, secret_of, the_operator
from tests.factories import Mill, a_step, together
from tests.fakes import SettableClock


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"auth": "token"})


@pytest.fixture
def admin(coordinator: AppState, client: httpx.Client) -> Member:
    return a_member(coordinator, client, "acme")


@pytest.fixture
def operator(coordinator: AppState, client: httpx.Client) -> Member:
    return the_operator(coordinator, client)


def runners_of(member: Member) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = member.ask("GET", "/api/runners").json()
    return found


# Making tokens


def test_a_token_is_shown_once_and_counts_once_for_a_day_unless_it_says_more(
    admin: Member, clock: SettableClock
) -> None:
    made = admin.an_enrolment_token()

    assert made["token"].startswith("bme_") and len(made["token"]) == 47
    assert (made["maxUses"], made["uses"], made["state"]) == (1, 0, "usable")
    assert (made["accountId"], made["isShared"]) == ("acme", False)
    assert "labels" not in made
    assert made["createdAt"].startswith("2026-03-01") and made["expiresAt"].startswith("2026-03-02")
    (listed,) = admin.ask("GET", "/api/enrolment-tokens").json()
    assert listed == {name: value for name, value in made.items() if name != "token"}


@pytest.mark.parametrize(
    ("said", "path"),
    [
        ({"name": ""}, "name"),
        ({"name": " x"}, "name"),
        ({"maxUses": 0}, "maxUses"),
        ({"maxUses": 10_001}, "maxUses"),
        ({"maxUses": True}, "maxUses"),
        ({"expiresInSeconds": 0}, "expiresInSeconds"),
        ({"expiresInSeconds": 365 * 86400 + 1}, "expiresInSeconds"),
        ({"labels": ["a b"]}, "labels[0]"),
        ({"labels": "gpu"}, "labels"),
        ({"tenantId": "x"}, "tenantId"),
    ],
)
def test_what_a_token_cannot_be_is_named(admin: Member, said: dict[str, Any], path: str) -> None:
    answer = admin.ask("POST", "/api/enrolment-tokens", {"name": "x", **said})

    assert answer.status_code == 400
    assert [fault["path"] for fault in answer.json()["details"]] == [path]
    assert admin.ask("GET", "/api/enrolment-tokens").json() == []


def test_who_may_not_enrol_makes_lists_and_revokes_nothing(
    admin: Member, coordinator: AppState, client: httpx.Client
) -> None:
    made = admin.an_enrolment_token()
    developer = a_member(coordinator, client, "acme", Role.DEVELOPER)

    assert developer.ask("POST", "/api/enrolment-tokens", {"name": "x"}).status_code == 403
    assert developer.ask("GET", "/api/enrolment-tokens").status_code == 403
    assert developer.ask("DELETE", f"/api/enrolment-tokens/{made['id']}").status_code == 403
    assert enrol(client, made["token"]).status_code == 201


def test_the_tokens_of_others_are_not_there(
    admin: Member, operator: Member, coordinator: AppState, client: httpx.Client
) -> None:
    theirs = a_member(coordinator, client, "other").an_enrolment_token()
    shared = operator.an_enrolment_token(shared=True)

    answers = [
        admin.ask("DELETE", f"/api/enrolment-tokens/{one}") for one in (theirs["id"], shared["id"], new_id())
    ]

    assert {(answer.status_code, answer.text) for answer in answers} == {(404, answers[0].text)}
    assert admin.ask("GET", "/api/enrolment-tokens").json() == []
    listed = operator.ask("GET", "/api/enrolment-tokens").json()
    assert [(one["id"], one["state"]) for one in listed] == [
        (shared["id"], "usable"),
        (theirs["id"], "usable"),
    ]


def test_only_the_operator_enrols_runners_for_everybody(admin: Member, operator: Member) -> None:
    assert admin.ask("POST", "/api/enrolment-tokens", {"name": "x", "shared": True}).status_code == 403

    made = operator.an_enrolment_token(shared=True)

    assert made["isShared"] and "accountId" not in made


def test_the_operator_says_for_whom(admin: Member, operator: Member) -> None:
    unsaid = operator.ask("POST", "/api/enrolment-tokens", {"name": "x"})
    about_acme = replace(operator, headers={**operator.headers, "X-Tenant-ID": admin.tenant_id})

    assert unsaid.status_code == 400
    assert [fault["path"] for fault in unsaid.json()["details"]] == ["X-Tenant-ID"]
    assert about_acme.an_enrolment_token()["accountId"] == "acme"


# Using them


def test_a_runner_belongs_to_the_tenant_of_its_token(
    admin: Member, mill: Mill, coordinator: AppState, client: httpx.Client
) -> None:
    made = admin.an_enrolment_token(labels=["gpu", "arm"])

    enrolled = enrol(client, made["token"], "gpu")

    assert enrolled.status_code == 201
    (shown,) = runners_of(admin)
    assert shown["id"] == enrolled.json()["runnerId"]
    assert (shown["accountId"], shown["isShared"], shown["labels"]) == ("acme", False, ["gpu"])
    assert runners_of(a_member(coordinator, client, "other")) == []
    (record,) = mill.audited("runner.registered")
    assert (record.tenant_id, record.actor) == (admin.tenant_id, f"enrolment:{made['id']}")
    assert record.details["enrolmentTokenId"] == made["id"]


def test_the_registration_token_makes_shared_runners_of_any_labels_any_number_of_times(
    admin: Member, coordinator: AppState, client: httpx.Client
) -> None:
    for label in ("gpu", "arm", "anything"):
        assert enrol(client, coordinator.credentials.registration_token, label).status_code == 201

    shown = runners_of(admin)
    assert [one["isShared"] for one in shown] == [True, True, True]
    assert all("accountId" not in one for one in shown)


def test_a_label_that_the_token_does_not_give_is_named_and_uses_nothing_up(
    admin: Member, client: httpx.Client
) -> None:
    token = admin.an_enrolment_token(labels=["gpu"])["token"]

    refused = enrol(client, token, "gpu", "privileged")

    assert refused.status_code == 403
    assert "privileged" in refused.json()["error"]
    assert [fault["path"] for fault in refused.json()["details"]] == ["labels[1]"]
    assert enrol(client, token, "gpu").status_code == 201


def test_a_token_of_no_labels_gives_none(admin: Member, client: httpx.Client) -> None:
    token = admin.an_enrolment_token(labels=[])["token"]

    assert enrol(client, token, "gpu").status_code == 403
    assert enrol(client, token).status_code == 201


def test_a_registration_that_is_not_valid_uses_nothing_up(admin: Member, client: httpx.Client) -> None:
    token = admin.an_enrolment_token()["token"]

    assert enrol(client, token, name=" x").status_code == 400

    assert enrol(client, token).status_code == 201


def test_a_token_in_the_path_of_users_or_runners_is_nobody(admin: Member, client: httpx.Client) -> None:
    headers = {"Authorization": f"Bearer {admin.an_enrolment_token()['token']}"}

    assert client.get("/api/runners", headers=headers).status_code == 401
    assert client.post("/api/runner/bye", headers=headers).status_code == 401


def test_revoking_twice_is_revoking_once_and_the_runners_stay(
    admin: Member, client: httpx.Client, mill: Mill
) -> None:
    made = admin.an_enrolment_token(maxUses=5)
    runner = enrol(client, made["token"]).json()

    for _ in range(2):
        assert admin.ask("DELETE", f"/api/enrolment-tokens/{made['id']}").status_code == 204

    (listed,) = admin.ask("GET", "/api/enrolment-tokens").json()
    assert (listed["state"], listed["uses"]) == ("revoked", 1)
    assert client.post("/api/runner/bye", headers=secret_of(runner)).status_code == 200
    assert len(mill.audited("enrolment.revoked")) == 1


# Whose steps a runner takes


def a_caller_of(runner: dict[str, Any], mill: Mill) -> Any:
    made = mill.a_runner()
    return replace(made, id=runner["runnerId"], secret=runner["runnerSecret"])


def test_a_runner_takes_the_steps_of_its_tenant_and_a_shared_one_takes_all(admin: Member, mill: Mill) -> None:
    theirs = mill.a_build(project_id=mill.a_project("other"))
    ours = mill.a_build(project_id=mill.a_project("acme"))

    held = mill.acquire(a_caller_of(admin.a_runner(), mill), slots=5)

    assert [one.claim.build_id for one in held] == [ours.id]
    assert [one.claim.build_id for one in mill.acquire(mill.a_runner(), slots=5)] == [theirs.id]


def test_labels_count_within_the_tenant_too(admin: Member, mill: Mill) -> None:
    wanting = [a_step("test", labels=["gpu"])]
    mill.a_build(wanting, project_id=mill.a_project("other"))
    ours = mill.a_build(wanting, project_id=mill.a_project("acme"))
    plain, able = (a_caller_of(admin.a_runner(*labels), mill) for labels in ((), ("gpu",)))

    assert mill.acquire(plain, slots=5, labels=["gpu"]) == []
    held = mill.acquire(able, slots=5, labels=["gpu"], only_labelled=True)
    assert [one.claim.build_id for one in held] == [ours.id]


def test_many_runners_of_two_tenants_share_nothing(
    admin: Member, coordinator: AppState, client: httpx.Client, mill: Mill
) -> None:
    spec = [a_step(f"s{number}") for number in range(6)]
    project = {account: mill.a_project(account) for account in ("acme", "other")}
    builds = {mill.a_build(spec, project_id=one).id: account for account, one in project.items()}
    members = {"acme": admin, "other": a_member(coordinator, client, "other")}
    callers = [
        (account, a_caller_of(member.a_runner(), mill))
        for account, member in members.items()
        for _ in range(3)
    ]

    def claim(account: str, runner: Any) -> Callable[[], list[tuple[str, str, str]]]:
        return lambda: [
            (account, builds[held.claim.build_id], held.step_id) for held in mill.acquire(runner, slots=2)
        ]

    claimed = together(*(claim(*one) for one in callers))

    flat = [one for part in claimed if isinstance(part, list) for one in part]
    assert all(account == owner for account, owner, _ in flat)
    assert len({step_id for *_, step_id in flat}) == len(flat) == 12


def test_an_app_in_open_mode_takes_tokens_as_well(
    new_app: Callable[[Settings], Starlette],
    new_client: Callable[[Starlette], httpx.Client],
    settings: Settings,
) -> None:
    client = new_client(new_app(settings.model_copy(update={"auth": "open"})))
    made = client.post("/api/enrolment-tokens", json={"name": "x", "shared": True}).json()

    assert enrol(client, made["token"]).status_code == 201
    assert enrol(client, made["token"]).status_code == 401
    assert client.post("/api/runners", json={"name": "r"}).status_code == 201


def test_the_steps_of_other_tenants_are_not_walked_past(
    admin: Member, mill: Mill, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = a_caller_of(admin.a_runner(), mill)
    database = mill.state.lanes.database
    asked = []

    execute = _Compiled.execute

    def listen(compiled: _Compiled, tx: Any, values: Any) -> Any:
        if "tenant_id =" in compiled._sql and "MATERIALIZED" in compiled._sql:
            asked.append((compiled._sql, compiled._parameters(values)))
        return execute(compiled, tx, values)

    with monkeypatch.context() as patched:
        patched.setattr(_Compiled, "execute", listen)
        mill.acquire(runner)

    def explain(tx: Any) -> str:
        cursor = tx.connection().connection.dbapi_connection.cursor()
        if not database.is_sqlite:
            cursor.execute("SET LOCAL enable_seqscan = off")  # in a table of no rows anything is quick
        word = "EXPLAIN QUERY PLAN" if database.is_sqlite else "EXPLAIN"
        cursor.execute(f"{word} {asked[0][0]}", asked[0][1])
        return str(cursor.fetchall())

    plan = mill.tx(explain)
    assert "ix_steps_queue_tenant" in plan and "tenant_id" in plan.partition("ix_steps_queue_tenant")[2]
