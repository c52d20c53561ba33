"""Who gets in: open mode trusts local callers and nobody's pages, token mode wants a token."""

import os
import stat
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from coordinator.app import ALL_ENDPOINTS
from coordinator.rules.access import Audience
from coordinator.settings import Settings
from tests.factories import ON_SQLITE, Api
from tests.fakes import a_scope, carry

pytestmark = ON_SQLITE
HOST = (b"host", b"localhost:3000")


async def status_of(
    app: Starlette, raw_path: bytes, *headers: tuple[bytes, bytes], method: str = "GET"
) -> int:
    path, _, query = raw_path.partition(b"?")
    status, _, _ = await carry(app, a_scope(method, path, query=query, headers=list(headers)), b"")
    return status


def a_path_of(endpoint: Any) -> str:
    path: str = endpoint.path
    for name in ("id", "workflowId", "stepId"):
        path = path.replace("{" + name + "}", "0197e7e7-0000-7000-8000-000000000000")
    return path.replace("{sha256}", "0" * 64)


# Open mode


@pytest.mark.parametrize("host", ["localhost:3000", "localhost", "LOCALHOST", "127.0.0.1:3000", "[::1]:3000"])
def test_a_local_caller_is_let_in(client: httpx.Client, host: str) -> None:
    assert client.get("/api/runners", headers={"Host": host}).status_code == 200


@pytest.mark.threat("A17")
@pytest.mark.parametrize(
    "host",
    [
        b"evil.example",
        b"evil/%2f..admin?",
        b"localhost.evil.example",
        b"localhost@evil",
        b"0.0.0.0",
        b"",
        b"a b",
    ],
)
async def test_another_name_of_this_machine_is_not_ours(app: Starlette, host: bytes) -> None:
    for path in (b"/api/runners", b"/healthz", b"/nothing"):
        assert await status_of(app, path, (b"host", host)) == 400


@pytest.mark.threat("A17")
async def test_a_host_is_said_once(app: Starlette) -> None:
    assert await status_of(app, b"/api/runners") == 400
    assert await status_of(app, b"/api/runners", HOST, HOST) == 400


@pytest.mark.threat("A17")
@pytest.mark.parametrize("path", [b"@google.com", b"http://localhost:3000/api/runners", b"*", b""])
async def test_a_target_that_is_no_path_is_refused(app: Starlette, path: bytes) -> None:
    assert await status_of(app, path, HOST) in (400, 404)


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost:3001", "http://127.0.0.1:3000"]
)
def test_a_page_of_somebody_else_may_neither_look_nor_change(client: httpx.Client, origin: str) -> None:
    body = {"accountId": "acme", "name": "a project"}

    assert client.get("/api/runners", headers={"Origin": origin}).status_code == 403
    assert client.post("/api/projects", json=body, headers={"Origin": origin}).status_code == 403
    assert client.get("/api/projects?accountId=acme").json() == []


def test_our_own_page_may(client: httpx.Client) -> None:
    assert client.get("/api/runners", headers={"Origin": "http://localhost:3000"}).status_code == 200


@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", None],
)
def test_a_body_that_any_page_could_send_is_refused(client: httpx.Client, media_type: str | None) -> None:
    headers = {"Content-Type": media_type} if media_type else {}

    answer = client.post("/api/projects", content=b'{"accountId":"a","name":"n"}', headers=headers)

    assert answer.status_code == 415
    assert client.get("/api/projects?accountId=a").json() == []


def test_a_runner_needs_its_secret_even_here(client: httpx.Client) -> None:
    for endpoint in ALL_ENDPOINTS:
        if endpoint.policy.audience is not Audience.RUNNER:
            continue
        for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": "Basic Z3Vlc3M="}):
            answer = client.request(endpoint.method, a_path_of(endpoint), headers=headers)
            assert answer.status_code == 401, (endpoint.name, headers)
            assert answer.headers["www-authenticate"] == "Bearer"


def test_a_wrong_registration_token_is_refused_even_here(client: httpx.Client) -> None:
    answer = client.post("/api/runners", json={"name": "r"}, headers={"Authorization": "Bearer guess"})

    assert answer.status_code == 401


# Paths and methods


@pytest.mark.threat("A16")
@pytest.mark.parametrize(
    "path",
    [
        b"//api/runners",
        b"/api//runners",
        b"/api/runners/",
        b"/API/runners",
        b"/api/Runners",
        b"/api/runners;x=.js",
        b"/api/..;/api/runners",
        b"/healthz/../api/runners",
        b"/healthz/..%2fapi/runners",
        b"/api/%72unners",
        b"/api%2frunners",
        b"/api/%2e%2e/api/runners",
        b"/api/runners%00",
        b"/api/runners%0a",
        b"/x?jsp=/api/runners",
        b"/api/runner%73",
    ],
)
async def test_only_the_one_spelling_of_a_path_is_ours(app: Starlette, path: bytes) -> None:
    assert await status_of(app, path, HOST) == 404


@pytest.mark.threat("A18")
def test_a_method_is_what_the_request_line_says(client: httpx.Client) -> None:
    for headers in (
        {"X-HTTP-Method-Override": "DELETE"},
        {"X-Method-Override": "PUT"},
        {"X-HTTP-Method": "PATCH"},
    ):
        assert client.get("/api/runners", headers=headers).status_code == 200
    assert client.get("/api/runners?_method=DELETE").status_code == 400


@pytest.mark.threat("A18")
def test_other_methods_of_a_path_are_refused_and_the_right_ones_named(client: httpx.Client) -> None:
    for endpoint in ALL_ENDPOINTS:
        path = a_path_of(endpoint)
        known = {one.method for one in ALL_ENDPOINTS if a_path_of(one) == path}
        for method in {"HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "PURGE"} - known:
            answer = client.request(method, path)
            assert answer.status_code == 405, (method, path)
            assert answer.headers["allow"] == ", ".join(sorted(known))


def test_every_refusal_has_the_form_of_the_surface(client: httpx.Client) -> None:
    answers = [
        client.get("/nothing"),
        client.get("/api/nothing"),
        client.put("/api/projects"),
        client.get("/api/projects"),
        client.get("/api/runners", headers={"Host": "evil.example"}),
        client.get("/api/runners", headers={"Origin": "https://evil.example"}),
        client.post("/api/runner/acquire"),
    ]

    assert [answer.status_code for answer in answers] == [404, 404, 405, 400, 400, 403, 401]
    for answer in answers:
        assert set(answer.json()) == {"error", "code", "details"}
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


def test_health_is_for_everybody(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


# Token mode


@pytest.fixture
def closed(new_app: Any, new_client: Any, settings: Settings) -> httpx.Client:
    client: httpx.Client = new_client(new_app(settings.model_copy(update={"auth": "token"})))
    return client


def key(settings: Settings, name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {(settings.data / 'keys' / name).read_text().strip()}"}


def test_without_a_token_nothing_but_health_and_logins_is_answered(closed: httpx.Client) -> None:
    for endpoint in ALL_ENDPOINTS:
        if endpoint.policy.permission == "login:create":
            continue  # a login is what a token is got by
        expected = 200 if endpoint.policy.audience is Audience.ANYONE else 401
        for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": "Bearer "}):
            answer = closed.request(endpoint.method, a_path_of(endpoint), headers=headers)
            assert answer.status_code == expected, (endpoint.method, endpoint.path)


def test_the_administrators_token_opens_what_users_may(closed: httpx.Client, settings: Settings) -> None:
    admin = key(settings, "admin-token")
    body = {"accountId": "acme", "name": "a project"}

    assert closed.post("/api/projects", json=body, headers=admin).status_code == 201
    assert len(closed.get("/api/projects?accountId=acme", headers=admin).json()) == 1
    row = closed.get("/api/audit-logs", headers=admin).json()["auditLogs"][0]
    assert row["actor"] == "admin"


def test_the_registration_token_enrols_runners_and_opens_nothing_else(
    closed: httpx.Client, settings: Settings
) -> None:
    token = key(settings, "registration-token")

    assert closed.post("/api/runners", json={"name": "r"}, headers=token).status_code == 201
    assert closed.get("/api/runners", headers=token).status_code == 401
    assert closed.post("/api/runner/acquire", json={}, headers=token).status_code == 401


def test_a_runners_secret_opens_its_own_work_and_nothing_else(
    closed: httpx.Client, settings: Settings
) -> None:
    made = closed.post("/api/runners", json={"name": "r"}, headers=key(settings, "admin-token")).json()
    secret = {"Authorization": f"Bearer {made['runnerSecret']}"}

    assert Api(closed).acquire(secret) == []
    assert closed.get("/api/runners", headers=secret).status_code == 401
    assert closed.post("/api/projects", json={}, headers=secret).status_code == 401
    assert closed.post("/api/runners", json={"name": "r"}, headers=secret).status_code == 401


def test_a_credential_is_given_once(closed: httpx.Client, settings: Settings) -> None:
    admin = key(settings, "admin-token")["Authorization"]

    twice = [("Authorization", admin), ("Authorization", admin)]

    assert closed.get("/api/runners", headers=twice).status_code == 401
    assert closed.get(f"/api/runners?token={admin}").status_code == 401


def test_the_fixed_pair_wants_a_users_token_here(closed: httpx.Client, settings: Settings) -> None:
    admin = key(settings, "admin-token")

    assert closed.get("/api/runner/nope").status_code == 401
    assert closed.get("/api/runner/nope", headers=admin).status_code == 404
    assert closed.post("/api/runner/nope/complete", json={"status": "success"}).status_code == 401
    assert (
        closed.post("/api/runner/nope/complete", json={"status": "success"}, headers=admin).status_code == 404
    )


# Keys


def test_keys_are_made_once_and_readable_by_their_owner_only(
    new_app: Any, app: Starlette, settings: Settings
) -> None:
    folder = settings.data / "keys"
    before = {path.name: path.read_text() for path in folder.iterdir()}

    new_app(settings)

    assert set(before) == {
        "admin-token",
        "registration-token",
        "lease-key",
        "secrets-key",
        "token-keys",
        "audit-key",
    }
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    credentials = app.state.coordinator.credentials
    assert credentials.admin_token not in repr(credentials)
