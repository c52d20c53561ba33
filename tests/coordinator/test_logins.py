"""A user logs in, goes on, and logs out; tokens stop to count when they should."""

from datetime import timedelta
from typing import Any

import httpx
import jwt
import pytest
from starlette.applications import Starlette

from coordinator.access_tokens import key_id
from coordinator.actions.create_token import create_token
from coordinator.actions.log_in import begin_login
from coordinator.api.identify import CACHE_S
from coordinator.api.state import AppState
from coordinator.errors import Unauthenticated
from coordinator.keys import load_access_tokens
from coordinator.rules.access import Audience, Caller
from coordinator.settings import Settings
from tests.factories import PASSWORD, Mill

LOGIN = "/api/v1/auth/login"
ME = "/api/v1/auth/me"


def log_in(client: httpx.Client, email: str = "ann@acme.test", password: str = PASSWORD) -> httpx.Response:
    return client.post(LOGIN, json={"email": email, "password": password})


def as_holder(login: httpx.Response) -> dict[str, str]:
    return {"Authorization": f"Bearer {login.json()['token']}"}


def test_a_login_says_who_one_is_and_where_one_belongs(client: httpx.Client, mill: Mill) -> None:
    user = mill.a_user(acme="owner", other="viewer")

    said = log_in(client, " Ann@ACME.test ").json()

    assert said["token_type"] == "Bearer"
    assert said["user"] == {"id": user.id, "email": "ann@acme.test", "is_admin": False}
    assert said["tenants"] == [
        {"id": mill.a_tenant("acme"), "name": "acme", "role": "owner"},
        {"id": mill.a_tenant("other"), "name": "other", "role": "viewer"},
    ]
    me = client.get(ME, headers={"Authorization": f"Bearer {said['token']}"}).json()
    assert me["user"]["id"] == user.id
    assert "audit:read" in me["tenants"][0]["permissions"] or "audit:read" in me["tenants"][1]["permissions"]


@pytest.mark.parametrize("email", ["ann@acme.test", "nobody@acme.test", "no address", "ann@acme.test\u200b"])
def test_a_wrong_login_reads_the_same_for_everybody(client: httpx.Client, mill: Mill, email: str) -> None:
    mill.a_user()

    answer = log_in(client, email, "wrong wrong wrong")

    assert answer.status_code == 401
    said = answer.json()
    assert (said["code"], said["error"]) == ("UNAUTHORIZED", "the address or the password is wrong")


def test_a_login_is_a_field_for_field_body(client: httpx.Client) -> None:
    answer = client.post(LOGIN, json={"email": 5, "tenant_id": "x"})

    assert answer.status_code == 400
    assert set(answer.json()["details"]) == {"email", "password", "tenant_id"}


def test_a_token_counts_until_it_expires(client: httpx.Client, mill: Mill, settings: Settings) -> None:
    mill.a_user()
    holder = as_holder(log_in(client))

    mill.clock.advance(settings.access_token_minutes * 60 - 1)
    before = client.get(ME, headers=holder)
    mill.clock.advance(1)
    after = client.get(ME, headers=holder)

    assert (before.status_code, after.status_code) == (200, 401)


def test_a_refresh_token_counts_once(client: httpx.Client, mill: Mill) -> None:
    mill.a_user()
    first = log_in(client).json()["refresh_token"]

    second = client.post("/api/v1/auth/refresh", json={"refresh_token": first})
    third = client.post("/api/v1/auth/refresh", json={"refresh_token": second.json()["refresh_token"]})
    mill.clock.advance(60)
    stolen = client.post("/api/v1/auth/refresh", json={"refresh_token": second.json()["refresh_token"]})

    assert (second.status_code, third.status_code, stolen.status_code) == (200, 200, 401)
    assert client.get(ME, headers=as_holder(third)).status_code == 401, "the whole login has ended"
    assert [row.action for row in mill.audited("login.reused")] == ["login.reused"]


@pytest.mark.parametrize("later_s", [0, 60])
def test_a_thief_who_is_quick_twice_is_found_out_by_the_user(
    client: httpx.Client, mill: Mill, later_s: int
) -> None:
    mill.a_user()
    of_user = log_in(client).json()["refresh_token"]

    second = client.post("/api/v1/auth/refresh", json={"refresh_token": of_user})
    third = client.post("/api/v1/auth/refresh", json={"refresh_token": second.json()["refresh_token"]})
    mill.clock.advance(later_s)
    answer = client.post("/api/v1/auth/refresh", json={"refresh_token": of_user})

    assert (third.status_code, answer.status_code) == (200, 401)
    assert client.get(ME, headers=as_holder(third)).status_code == 401, "the login of both has ended"
    assert [row.action for row in mill.audited("login.reused")] == ["login.reused"]


@pytest.mark.parametrize("change", ["login", "word", "seal"])
def test_a_refresh_token_that_was_made_up_ends_nobodys_login(
    client: httpx.Client, mill: Mill, change: str
) -> None:
    mill.a_user()
    mine, others = log_in(client), log_in(client)
    parts = dict(zip(["login", "word", "seal"], mine.json()["refresh_token"].split("."), strict=True))
    foreign = dict(zip(["login", "word", "seal"], others.json()["refresh_token"].split("."), strict=True))

    made_up = ".".join({**parts, change: foreign[change]}.values())
    answer = client.post("/api/v1/auth/refresh", json={"refresh_token": made_up})

    assert answer.status_code == 401
    assert client.get(ME, headers=as_holder(mine)).status_code == 200
    assert client.get(ME, headers=as_holder(others)).status_code == 200


def test_an_answer_that_was_lost_does_not_end_a_login(client: httpx.Client, mill: Mill) -> None:
    mill.a_user()
    first = log_in(client).json()["refresh_token"]

    answers = [client.post("/api/v1/auth/refresh", json={"refresh_token": first}) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert client.get(ME, headers=as_holder(answers[1])).status_code == 200


def test_who_has_logged_out_is_not_known_any_more(client: httpx.Client, mill: Mill) -> None:
    mill.a_user()
    here, there = log_in(client), log_in(client)

    answer = client.post("/api/v1/auth/logout", headers=as_holder(here))

    assert answer.status_code == 204
    assert client.get(ME, headers=as_holder(here)).status_code == 401
    assert client.get(ME, headers=as_holder(there)).status_code == 200
    refreshed = client.post("/api/v1/auth/refresh", json={"refresh_token": here.json()["refresh_token"]})
    assert refreshed.status_code == 401
    client.post("/api/v1/auth/logout", headers=as_holder(there), json={"everywhere": True})
    assert client.get(ME, headers=as_holder(there)).status_code == 401


def test_another_password_ends_every_login(client: httpx.Client, mill: Mill) -> None:
    mill.a_user()
    here, there = log_in(client), log_in(client)
    change = {"current_password": PASSWORD, "new_password": "another horse and staple"}

    wrong = client.post(
        "/api/v1/auth/password", headers=as_holder(here), json={**change, "current_password": "no"}
    )
    weak = client.post(
        "/api/v1/auth/password", headers=as_holder(here), json={**change, "new_password": "a" * 20}
    )
    right = client.post("/api/v1/auth/password", headers=as_holder(here), json=change)

    assert (wrong.status_code, weak.status_code, right.status_code) == (403, 400, 204)
    assert [client.get(ME, headers=as_holder(one)).status_code for one in (here, there)] == [401, 401]
    assert log_in(client).status_code == 401
    assert log_in(client, password="another horse and staple").status_code == 200


def test_a_new_password_that_is_too_weak_is_no_guess_of_the_old_one(
    client: httpx.Client, mill: Mill, settings: Settings
) -> None:
    mill.a_user()
    here = as_holder(log_in(client))
    weak = {"current_password": PASSWORD, "new_password": "a" * 20}

    answers = [
        client.post("/api/v1/auth/password", headers=here, json=weak)
        for _ in range(settings.login_failures + 1)
    ]

    assert {answer.status_code for answer in answers} == {400}
    assert list(answers[-1].json()["details"]) == ["new_password"]
    assert log_in(client).status_code == 200


def test_who_is_disabled_is_out_at_once(client: httpx.Client, mill: Mill) -> None:
    user = mill.a_user(acme="owner")
    holder = as_holder(log_in(client))

    client.patch(f"/api/users/{user.id}", json={"isDisabled": True})

    assert client.get(ME, headers=holder).status_code == 401
    assert log_in(client).status_code == 401


def test_a_role_that_goes_takes_its_rights_at_once(client: httpx.Client, mill: Mill) -> None:
    tenant = mill.a_tenant()
    user = mill.a_user(acme="developer")
    mill.a_user("owner@acme.test", acme="owner")
    holder = as_holder(log_in(client))

    client.delete(f"/api/tenants/{tenant}/members/{user.id}")

    assert client.get(ME, headers=holder).json()["tenants"] == []
    assert CACHE_S <= 5


def test_open_access_ends_where_logins_begin(client: httpx.Client) -> None:
    assert client.get(ME).status_code == 401
    assert client.get("/api/tenants").status_code == 200


def forged(coordinator: AppState, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A token with the right signature that says something else."""
    keys = coordinator.site.access_tokens._keys
    kid = next(iter(keys))
    now = int(coordinator.clock().timestamp())
    said = {
        "iss": "buildmill",
        "aud": "buildmill:user",
        "sub": "u",
        "sid": "s",
        "iat": now,
        "exp": now + 60,
        **claims,
    }
    said = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(said, keys[kid], "HS256", headers={"kid": kid, **(header or {})})


def test_a_signed_token_of_nobody_opens_nothing(client: httpx.Client, coordinator: AppState) -> None:
    answer = client.get(ME, headers={"Authorization": f"Bearer {forged(coordinator)}"})

    assert answer.status_code == 401


def test_keys_are_replaced_one_by_one(
    new_app: Any, new_client: Any, settings: Settings, mill: Mill, client: httpx.Client, app: Starlette
) -> None:
    mill.a_user()
    old = as_holder(log_in(client))
    path = settings.data / "keys" / "token-keys"
    before = path.read_text()
    fresh = "00112233445566778899aabbccddeeff" * 2
    path.write_text(f"{fresh}\n{before}")

    renewed = new_client(new_app(settings))

    assert renewed.get(ME, headers=old).status_code == 200
    token = log_in(renewed).json()["token"]
    assert jwt.get_unverified_header(token)["kid"] == key_id(bytes.fromhex(fresh))
    path.write_text(f"{fresh}\n")
    left = load_access_tokens(settings.data)
    assert left.verify(token, now=mill.clock()).user_id
    with pytest.raises(Unauthenticated):
        left.verify(old["Authorization"].removeprefix("Bearer "), now=mill.clock())


@pytest.mark.threat("A19")
def test_guesses_are_counted_and_a_restart_forgets_none(
    client: httpx.Client, mill: Mill, settings: Settings, new_app: Any, new_client: Any
) -> None:
    mill.a_user()
    guesses = [log_in(client, password="wrong").status_code for _ in range(settings.login_failures)]

    refused = log_in(client)
    restarted = log_in(new_client(new_app(settings)), " ANN@acme.test")
    mill.clock.advance(settings.login_window_minutes * 60)
    later = log_in(client)

    assert set(guesses) == {401}
    assert (refused.status_code, restarted.status_code, later.status_code) == (429, 429, 200)
    assert 0 < int(refused.headers["Retry-After"]) <= settings.login_window_minutes * 60
    assert log_in(client).status_code == 200, "a success begins anew"


@pytest.mark.threat("A19")
def test_a_peer_that_tries_every_account_is_stopped(
    client: httpx.Client, mill: Mill, settings: Settings
) -> None:
    for number in range(settings.login_failures_peer):
        mill.now(begin_login, mill.site, f"user{number}@acme.test", address="127.0.0.1")

    answer = client.post(
        LOGIN,
        json={"email": "ann@acme.test", "password": "x"},
        headers={"X-Forwarded-For": "192.0.2.1", "Forwarded": "for=192.0.2.1"},
    )

    assert answer.status_code == 429


@pytest.mark.parametrize("change", [{"isDisabled": True}, {"password": "another horse and staple"}])
def test_who_may_have_been_robbed_loses_the_tokens_of_programs_too(
    client: httpx.Client, mill: Mill, change: dict[str, Any]
) -> None:
    user = mill.a_user(acme="developer")
    holder = {**as_holder(log_in(client)), "X-Tenant-ID": mill.a_tenant()}
    caller = {"actor": "x", "audience": Audience.USER, "user_id": user.id, "tenant_id": mill.a_tenant()}
    maker = Caller(**caller, grants={mill.a_tenant(): frozenset({"build:read"})})
    _, secret = mill.now(
        create_token, maker, name="theirs", permissions=["build:read"], lifetime=timedelta(days=300)
    )
    program = {"Authorization": f"Bearer {secret}"}
    before = client.get(ME, headers=program).status_code

    client.patch(f"/api/users/{user.id}", json=change)
    client.patch(f"/api/users/{user.id}", json={"isDisabled": False})

    assert before == 200
    assert client.get(ME, headers=program).status_code == 401
    assert client.get(ME, headers=holder).status_code == 401
    assert mill.audited("user.changed")[0].details["tokensRevoked"] == 1
