"""Whoever wants to be somebody else, somewhere else, or more than they are."""

import asyncio
import base64
import hashlib
import hmac
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from argon2 import PasswordHasher
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.applications import Starlette

from coordinator.access_tokens import AUDIENCE, ISSUER
from coordinator.actions.change_password import change_password
from coordinator.actions.change_user import UserChanges, change_user
from coordinator.actions.create_image import create_image
from coordinator.actions.create_tenant import create_tenant
from coordinator.actions.create_user import create_user
from coordinator.actions.refresh_login import refresh_login
from coordinator.actions.remove_member import remove_member
from coordinator.actions.set_member import set_member
from coordinator.api.identify import CACHE_S
from coordinator.api.state import AppState
from coordinator.errors import AlreadyExists, Conflict, Denied
from coordinator.passwords import WeakPassword, hash_password, is_password
from coordinator.rules.access import Audience, Caller
from coordinator.rules.permissions import Role, permissions_of
from coordinator.settings import Settings
from coordinator.store import accounts
from shared.ids import new_id
from tests.factories import LOCAL, ON_POSTGRES, ON_SQLITE, PASSWORD, MadeUser, Mill, a_step, together
from tests.fakes import a_scope, carry

LOGIN = "/api/v1/auth/login"
REFRESH = "/api/v1/auth/refresh"
ME = "/api/v1/auth/me"
OTHER_PASSWORD = "another horse and staple"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    limits = {"rate_limit": 0, "rate_limit_peer": 0, "login_failures": 4}
    return settings.model_copy(update={"auth": "token", **limits})


@pytest.fixture
def owner(mill: Mill) -> MadeUser:
    return mill.a_user(acme="owner")


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def log_in(client: httpx.Client, user: MadeUser, password: str = PASSWORD) -> Any:
    answer = client.post(LOGIN, json={"email": user.email, "password": password})
    assert answer.status_code == 200, answer.text
    return answer.json()


def as_member(mill: Mill, user: MadeUser, account: str = "acme", permission: str = "") -> Caller:
    """A user who has logged in, as routes of this permission see her."""
    roles = {row.id: row.role for row in mill.tx(accounts.list_memberships, user.id)}
    return Caller(
        actor=f"user:{user.id}",
        audience=Audience.USER,
        tenant_id=mill.a_tenant(account),
        user_id=user.id,
        grants={tenant: permissions_of(role) for tenant, role in roles.items()},
        permission=permission,
        credential=f"login:{new_id()}",
    )


# Tokens that nobody signed, or that say what they should not


class Forger:
    """Makes tokens that are right in everything but what is asked for."""

    def __init__(self, state: AppState, genuine: str) -> None:
        self.key_id, self.key = next(iter(state.site.access_tokens._keys.items()))
        self.now = int(state.clock().timestamp())
        self.said = json.loads(_unpacked(genuine.split(".")[1]))

    def token(
        self,
        header: dict[str, Any] | None = None,
        sign: Callable[[bytes], bytes] | None = None,
        payload: str | None = None,
        **claims: Any,
    ) -> str:
        """None takes a claim, or a word of the header, away."""
        head = {"alg": "HS256", "typ": "JWT", "kid": self.key_id} | (header or {})
        body = {**self.said, **claims}
        parts = [_without_none(head), payload or _without_none(body)]
        signed = ".".join(_packed(part.encode()) for part in parts)
        return f"{signed}.{_packed((sign or self.sign)(signed.encode()))}"

    def sign(self, data: bytes) -> bytes:
        return hmac.digest(self.key, data, hashlib.sha256)

    def saying(self, claim: str, text: str) -> str:
        """A token whose payload has this very text as the value of a claim."""
        payload = json.dumps({**self.said, claim: "<here>"}).replace('"<here>"', text)
        return self.token(payload=payload)


def _packed(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _unpacked(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _without_none(said: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in said.items() if value is not None})


@pytest.fixture
def forger(client: httpx.Client, coordinator: AppState, owner: MadeUser) -> Forger:
    return Forger(coordinator, log_in(client, owner)["token"])


def status(client: httpx.Client, token: str) -> int:
    return client.get(ME, headers=bearer(token)).status_code


@ON_SQLITE
def test_what_the_forger_makes_would_count_but_for_what_is_asked(
    client: httpx.Client, forger: Forger
) -> None:
    assert status(client, forger.token()) == 200
    assert status(client, forger.saying("exp", str(forger.now + 60))) == 200


@ON_SQLITE
@pytest.mark.threat("A01")
@pytest.mark.parametrize("algorithm", ["none", "None", "nOnE", "NONE", "", None, "HS384", "HS512", "hs256"])
def test_a_token_is_signed_as_we_sign(client: httpx.Client, forger: Forger, algorithm: str | None) -> None:
    unsigned = forger.token({"alg": algorithm}, sign=lambda _: b"")
    signed = forger.token({"alg": algorithm})

    assert (status(client, unsigned), status(client, signed)) == (401, 401)
    assert status(client, forger.token().rpartition(".")[0] + ".") == 401


@ON_SQLITE
@pytest.mark.threat("A02")
def test_only_our_own_key_signs(client: httpx.Client, forger: Forger) -> None:
    rsa_key = rsa.generate_private_key(65537, 2048)
    ec_key, ed_key = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    signers: dict[str, Callable[[bytes], bytes]] = {
        "RS256": lambda data: rsa_key.sign(data, PKCS1v15(), SHA256()),
        "ES256": lambda data: ec_key.sign(data, ec.ECDSA(SHA256())),
        "EdDSA": ed_key.sign,
    }
    public = rsa_key.public_key()
    numbers = public.public_numbers()
    jwk = {"kty": "RSA", "n": _packed(numbers.n.to_bytes(256)), "e": "AQAB"}
    known_to_all = [
        public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
        public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        json.dumps(jwk).encode(),
        forger.key_id.encode(),
        forger.key.hex().encode(),
        b"",
    ]
    guesses = [forger.token({"alg": name}, sign) for name, sign in signers.items()]
    guesses += [
        forger.token(sign=lambda data, key=key: hmac.digest(key, data, "sha256")) for key in known_to_all
    ]
    guesses.append(forger.token({"jwk": jwk, "alg": "RS256"}, signers["RS256"]))

    assert {status(client, guess) for guess in guesses} == {401}


@ON_SQLITE
@pytest.mark.threat("A03")
@pytest.mark.parametrize("header", [{"crit": ["x"], "x": 1}, {"crit": ["exp"]}, {"crit": []}, {"b64": False}])
def test_an_extension_that_we_do_not_know_is_refused(
    client: httpx.Client, forger: Forger, header: dict[str, Any]
) -> None:
    assert status(client, forger.token(header)) == 401


@ON_SQLITE
@pytest.mark.threat("A04")
@pytest.mark.parametrize(
    "key_id", ["../../dev/null", "/dev/null", "' OR 1=1--", "x" * 2000, "", 1, True, ["a"], {"a": "b"}, None]
)
def test_a_key_is_one_of_ours_by_name(client: httpx.Client, forger: Forger, key_id: Any) -> None:
    empty = forger.token({"kid": key_id}, sign=lambda data: hmac.digest(b"", data, "sha256"))

    assert (status(client, forger.token({"kid": key_id})), status(client, empty)) == (401, 401)


@ON_SQLITE
@pytest.mark.threat("A04")
def test_nobody_is_asked_for_a_key(client: httpx.Client, forger: Forger) -> None:
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.setblocking(False)
        address = f"http://127.0.0.1:{door.getsockname()[1]}/keys"
        for name in ("jku", "x5u", "iss"):
            assert status(client, forger.token({name: address})) == 401
        assert status(client, forger.token(iss=address)) == 401

        with pytest.raises(BlockingIOError):
            door.accept()


@ON_SQLITE
@pytest.mark.threat("A05")
@pytest.mark.parametrize("claim", ["exp", "iat", "aud", "iss", "sub", "sid"])
def test_a_token_says_all_that_it_has_to(client: httpx.Client, forger: Forger, claim: str) -> None:
    assert status(client, forger.token(**{claim: None})) == 401
    for text in ('""', "[]", "{}", "true", "0", '"x"'):
        assert status(client, forger.saying(claim, text)) == 401, text


@ON_SQLITE
@pytest.mark.threat("A05")
def test_a_token_ends_at_a_moment_that_is_one(client: httpx.Client, forger: Forger) -> None:
    texts = [
        '"9e9"',
        "9e9",
        "1e400",
        "-1e400",
        "NaN",
        "Infinity",
        "-Infinity",
        "-1",
        str(10**15),
        str(10**400),
    ]
    texts += [f"{forger.now + 60}.5", f'"{forger.now + 60}"', f"[{forger.now + 60}]", str(forger.now + 10**6)]
    texts += [str(forger.now), str(forger.now - 1), str(forger.now - 31)]

    for text in texts:
        assert status(client, forger.saying("exp", text)) == 401, text
        if text != str(forger.now) and text != str(forger.now - 1) and text != str(forger.now - 31):
            assert status(client, forger.saying("iat", text)) == 401, text


@ON_SQLITE
@pytest.mark.threat("A06")
def test_a_token_of_tomorrow_counts_tomorrow(client: httpx.Client, mill: Mill, forger: Forger) -> None:
    day = 24 * 3600
    tomorrow = forger.token(iat=forger.now + day, exp=forger.now + day + 600)
    later = forger.token(nbf=forger.now + 120, exp=forger.now + 600)

    assert (status(client, tomorrow), status(client, later)) == (401, 401)
    mill.clock.advance(120)
    assert status(client, later) == 200


@ON_SQLITE
@pytest.mark.threat("A06")
def test_a_clock_that_went_back_trusts_again_when_it_is_right(
    client: httpx.Client, mill: Mill, forger: Forger
) -> None:
    token = forger.token()

    mill.clock.advance(-3600)
    assert status(client, token) == 401
    mill.clock.advance(3600)
    assert status(client, token) == 200


@ON_SQLITE
@pytest.mark.threat("A07")
def test_each_credential_opens_its_own_door_alone(
    client: httpx.Client, mill: Mill, forger: Forger, coordinator: AppState
) -> None:
    held = mill.a_running_step()
    user, program = forger.token(), mill.an_api_token("acme", "build:read")["Authorization"].split()[1]
    enrolment = client.post("/api/enrolment-tokens", json={"name": "e"}, headers={**bearer(user)}).json()[
        "token"
    ]
    proof = {"X-Attempt": str(held.proof.attempt), "X-Lease": held.proof.lease}
    doors: dict[str, Callable[[dict[str, str]], httpx.Response]] = {
        "user": lambda who: client.get(ME, headers=who),
        "runner": lambda who: client.post(
            "/api/runner/heartbeat", json={"session": held.runner.session}, headers=who
        ),
        "attempt": lambda who: client.post(
            f"/api/runner/{held.step_id}/start", json={}, headers={**who, **proof}
        ),
        "enrolment": lambda who: client.post("/api/runners", json={"name": "r"}, headers=who),
    }
    credentials = {
        "a login": (user, {"user"}),
        "a program": (program, {"user"}),
        "a runner": (held.runner.secret, {"runner", "attempt"}),
        "a lease": (held.proof.lease, set()),
        "an enrolment token": (enrolment, {"enrolment"}),
        "the registration token": (coordinator.credentials.registration_token, {"enrolment"}),
        "a login for runners": (forger.token(aud="buildmill:runner"), set()),
        "a login for everybody": (forger.token(aud=[AUDIENCE, "buildmill:runner"]), set()),
        "a login of somebody else": (forger.token(iss=f"{ISSUER}.example"), set()),
        "a refresh token": (log_in(client, MadeUser("", "ann@acme.test"))["refresh_token"], set()),
    }

    opened = {
        name: {door for door, knock in doors.items() if knock(bearer(token)).status_code not in (401, 403)}
        for name, (token, _) in credentials.items()
    }

    assert opened == {name: expected for name, (_, expected) in credentials.items()}


# Keys that can be guessed


@pytest.mark.threat("A08")
@pytest.mark.parametrize("line", ["secret123", "", "00" * 32, "11" * 31])
def test_a_weak_key_refuses_the_start_in_one_line(line: str, tmp_path: Path) -> None:
    data = tmp_path / "weak"
    (data / "keys").mkdir(parents=True)
    path = data / "keys" / "token-keys"
    path.write_text(f"{line}\n")
    path.chmod(0o600)

    start = [sys.executable, "-m", "coordinator", "coordinator", "--data", str(data), "--port", "0"]
    ended = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)

    assert (ended.returncode, ended.stdout) == (1, "")
    (said,) = ended.stderr.splitlines()
    assert said.startswith("Error: ") and str(path) in said
    assert not line or line not in said


# Rights that are gone


@pytest.fixture
def takes_away(client: httpx.Client, mill: Mill, owner: MadeUser) -> Callable[[str], list[int]]:
    """What a login and a program's token are answered, before and after a right was taken away."""

    def take(how: str) -> list[int]:
        member = mill.a_user("bob@acme.test", acme="admin")
        login = log_in(client, member)
        holder = bearer(login["token"])
        asked = {"name": "t", "permissions": ["audit:read"]}
        program = bearer(client.post("/api/tokens", json=asked, headers=holder).json()["token"])
        tenant, operator = mill.a_tenant(), mill.operator
        place = f"/api/tenants/{tenant}/members/{member.id}"
        ways: dict[str, Callable[[], httpx.Response]] = {
            "disabled": lambda: client.patch(
                f"/api/users/{member.id}", json={"isDisabled": True}, headers=operator
            ),
            "password": lambda: client.post(
                "/api/v1/auth/password",
                json={"current_password": PASSWORD, "new_password": OTHER_PASSWORD},
                headers=holder,
            ),
            "downgraded": lambda: client.put(place, json={"role": "viewer"}, headers=operator),
            "removed": lambda: client.delete(place, headers=operator),
            "logged out": lambda: client.post("/api/v1/auth/logout", headers=holder),
        }

        def ask() -> list[int]:
            return [client.get("/api/audit-logs", headers=who).status_code for who in (holder, program)]

        before = ask()
        assert ways[how]().status_code in (200, 204)
        return [*before, *ask()]

    return take


@pytest.mark.threat("A09")
@pytest.mark.parametrize(
    ("how", "after"),
    [
        ("disabled", [401, 401]),
        ("password", [401, 200]),
        ("downgraded", [403, 403]),
        ("removed", [403, 401]),
        ("logged out", [401, 200]),
    ],
)
def test_a_right_that_is_taken_away_is_gone_at_once(
    takes_away: Callable[[str], list[int]], how: str, after: list[int]
) -> None:
    assert takes_away(how) == [200, 200, *after]


@pytest.mark.threat("A09")
def test_another_coordinator_believes_for_five_seconds_at_most(
    client: httpx.Client, mill: Mill, owner: MadeUser, new_app: Any, new_client: Any, settings: Settings
) -> None:
    other = new_client(new_app(settings))
    holder = bearer(log_in(client, owner)["token"])
    assert other.get(ME, headers=holder).status_code == 200

    client.patch(f"/api/users/{owner.id}", json={"isDisabled": True}, headers=mill.operator)
    other._transport._app.state.coordinator.rights.have_changed()  # as if the time were over

    assert other.get(ME, headers=holder).status_code == 401
    assert CACHE_S <= 5


@pytest.mark.threat("A09")
def test_a_look_up_that_a_change_overtakes_is_not_believed(
    client: httpx.Client, mill: Mill, owner: MadeUser, portal: Any
) -> None:
    """The change comes between the look-up's end and its return, and another request in between."""
    identities = _identities(client)
    token = log_in(client, owner)["token"]
    stranger = log_in(client, mill.a_user("bob@acme.test"))["token"]
    read = identities._state.lanes.read

    async def overtaken(look: Any) -> Any:
        found = await read(look)
        object.__setattr__(identities._state.lanes, "read", read)
        await asyncio.to_thread(mill.now, change_user, LOCAL, owner.id, UserChanges(is_disabled=True))
        identities._state.rights.have_changed()
        await identities.of_token(stranger)
        return found

    object.__setattr__(identities._state.lanes, "read", overtaken)
    portal.call(identities.of_token, token)

    assert client.get(ME, headers=bearer(token)).status_code == 401


def _identities(client: httpx.Client) -> Any:
    routes = client._transport._app.router.routes  # type: ignore[attr-defined]
    return next(route.app._doorkeeper.identities for route in routes if hasattr(route.app, "_doorkeeper"))


@ON_SQLITE
@pytest.mark.threat("A10")
def test_open_access_reads_no_token(new_app: Any, new_client: Any, settings: Settings, mill: Mill) -> None:
    client = new_client(new_app(settings.model_copy(update={"auth": "open"})))
    member = mill.a_member("acme", "viewer")

    for headers in ({}, bearer("no.such.token"), bearer(""), {"Authorization": "Basic YTpi"}, member):
        headers = {name: value for name, value in headers.items() if name == "Authorization"}
        body = {"accountId": "made by " + str(len(headers)), "name": "a project"}
        assert client.post("/api/projects", json=body, headers=headers).status_code == 201
        assert client.get("/api/audit-logs", headers=headers).json()["auditLogs"][0]["actor"] == "local"


# Which tenant


@pytest.mark.threat("A11")
def test_the_header_chooses_among_ones_own_tenants_and_nothing_else(
    client: httpx.Client, mill: Mill, app: Starlette, portal: Any
) -> None:
    user = mill.a_user(acme="owner", second="viewer")
    mine, second, theirs = (mill.a_tenant(name) for name in ("acme", "second", "other"))
    project = mill.a_project("other")
    token = mill.a_login(user)["Authorization"].encode()
    table: dict[tuple[bytes, ...], int] = {
        (mine.encode(),): 200,
        (mine.upper().encode(),): 200,
        (second.encode(),): 200,
        (theirs.encode(),): 403,
        (new_id().encode(),): 403,
        (): 400,
        (mine.encode(), second.encode()): 400,
        (mine.encode(), mine.encode()): 400,
    }
    for text in (
        "", "null", "undefined", "*", "%", "../", f"../{mine}", "00000000-0000-0000-0000-000000000000",
        "acme", f"{mine},{second}", f"{mine}, {second}", f"{mine} ", f" {mine}", f"{mine}\t", f"{mine}%00",
        f"{mine}\0", f"{{{mine}}}", mine.replace("-", ""), f"urn:uuid:{mine}", f"{mine}' OR '1'='1", "0",
        "-1",
    ):  # fmt: skip
        table[(text.encode(),)] = 400

    for values, expected in table.items():
        headers = [(b"authorization", token), *((b"x-tenant-id", value) for value in values)]
        for path in (b"/api/v1/builds", f"/api/v1/builds/{new_id()}".encode(), b"/api/audit-logs"):
            wanted = expected
            if expected == 200 and path.startswith(b"/api/v1/builds/"):
                wanted = 404
            if expected == 200 and path == b"/api/audit-logs" and values[0].lower() == second.encode():
                wanted = 403
            scope = a_scope("GET", path, headers=[(b"host", b"localhost"), *headers])
            code, _, content = portal.call(carry, app, scope, b"")
            assert code == wanted, (values, path, content)
            assert project.encode() not in content and theirs.encode() not in content


@pytest.mark.threat("A11")
def test_even_the_operator_names_a_tenant_that_there_is(client: httpx.Client, mill: Mill) -> None:
    build = mill.a_build(project_id=mill.a_project("other"))

    def listed(**headers: str) -> httpx.Response:
        return client.get("/api/v1/builds", headers={**mill.operator, **headers})

    assert listed().status_code == 400
    assert listed(**{"X-Tenant-ID": new_id()}).status_code == 403
    assert listed(**{"X-Tenant-ID": mill.a_tenant("acme")}).json()["builds"] == []
    of_other = listed(**{"X-Tenant-ID": mill.a_tenant("other")}).json()["builds"]
    assert [one["id"] for one in of_other] == [build.id]


@pytest.mark.threat("A13")
def test_an_image_of_others_is_no_image(client: httpx.Client, mill: Mill) -> None:
    theirs, mine = mill.a_member("other", "developer"), mill.a_member("acme", "developer")
    image = {"slug": "theirs", "imageUrl": "registry.example/not/to/be/told:1"}
    made = client.post("/api/docker-images", json=image, headers=theirs)
    path = f"/api/projects/{mill.a_project('acme')}/workflows"

    def refusal(slug: str) -> httpx.Response:
        body = {"name": "w", "steps": [a_step(imageSlug=slug)]}
        return client.post(path, json=body, headers=mine)

    foreign, absent = refusal("theirs"), refusal("nobody")

    assert (made.status_code, foreign.status_code, absent.status_code) == (201, 400, 400)
    assert foreign.text.replace("theirs", "nobody") == absent.text
    assert client.get("/api/docker-images", headers=mine).json() == []


# More than one has


@pytest.mark.threat("A15")
def test_nobody_raises_themselves(client: httpx.Client, mill: Mill) -> None:
    mill.a_user("owner@acme.test", acme="owner")
    tenant, other = mill.a_tenant("acme"), mill.a_tenant("other")

    for role in ("viewer", "developer", "admin"):
        user = mill.a_user(f"{role}@acme.test", acme=role)
        holder = mill.a_login(user)
        for wanted in ("owner", "admin"):
            place = f"/api/tenants/{tenant}/members/{user.id}"
            answer = client.put(place, json={"role": wanted}, headers=holder)
            assert answer.status_code == (200 if role == wanted == "admin" else 403), (role, wanted)
        into_another = f"/api/tenants/{other}/members/{user.id}"
        expected = 404 if role == "admin" else 403
        assert client.put(into_another, json={"role": "admin"}, headers=holder).status_code == expected
        me = client.patch(f"/api/users/{user.id}", json={"isAdmin": True}, headers=holder)
        assert me.status_code == 403
        assert client.get(ME, headers=holder).json()["tenants"][0]["role"] == role


@pytest.mark.threat("A15")
def test_an_admin_neither_makes_nor_unmakes_owners(client: httpx.Client, mill: Mill) -> None:
    owner, friend = mill.a_user("owner@acme.test", acme="owner"), mill.a_user("friend@acme.test")
    mill.a_user("second@acme.test", acme="owner")
    admin, members = mill.a_member("acme", "admin"), f"/api/tenants/{mill.a_tenant()}/members"

    made = client.put(f"{members}/{friend.id}", json={"role": "owner"}, headers=admin)
    unmade = client.put(f"{members}/{owner.id}", json={"role": "viewer"}, headers=admin)
    removed = client.delete(f"{members}/{owner.id}", headers=admin)

    assert (made.status_code, unmade.status_code, removed.status_code) == (403, 403, 403)


@pytest.mark.threat("A15")
def test_a_token_gives_no_role_that_its_user_could_not(client: httpx.Client, mill: Mill) -> None:
    friend = mill.a_user("friend@acme.test")
    place = f"/api/tenants/{mill.a_tenant()}/members/{friend.id}"
    of_nobody = mill.an_api_token("acme", "member:set", "member:delete")
    admin = mill.a_member("acme", "admin")
    asked = {"name": "t", "permissions": ["member:set"]}
    of_admin = bearer(client.post("/api/tokens", json=asked, headers=admin).json()["token"])

    assert client.put(place, json={"role": "viewer"}, headers=of_nobody).status_code == 403
    assert client.put(place, json={"role": "owner"}, headers=of_admin).status_code == 403
    assert client.put(place, json={"role": "developer"}, headers=of_admin).status_code == 201
    assert client.delete(place, headers=of_admin).status_code == 403, "it was not made for that"


@pytest.mark.threat("A15")
def test_a_tenant_keeps_an_owner_who_can_log_in(client: httpx.Client, mill: Mill) -> None:
    first, second = mill.a_user("one@acme.test", acme="owner"), mill.a_user("two@acme.test", acme="owner")
    members = f"/api/tenants/{mill.a_tenant()}/members"

    def ask(method: str, user: MadeUser, **body: Any) -> int:
        headers = {**mill.operator}
        return client.request(method, f"{members}/{user.id}", headers=headers, **body).status_code

    client.patch(f"/api/users/{second.id}", json={"isDisabled": True}, headers=mill.operator)
    assert ask("DELETE", first) == 409, "the other one cannot log in"
    assert ask("PUT", first, json={"role": "admin"}) == 409
    assert ask("DELETE", second) == 204, "who cannot log in is not the last one"
    assert ask("DELETE", first) == 409


@pytest.mark.threat("A15")
@pytest.mark.parametrize("way", ["remove", "lower"])
def test_two_owners_who_unmake_each_other_leave_one(mill: Mill, way: str) -> None:
    for round_number in range(5):
        account = f"{way}-{round_number}"
        one, two = (mill.a_user(f"{name}@{account}.test", **{account: "owner"}) for name in ("one", "two"))
        tenant = mill.a_tenant(account)

        callers = [as_member(mill, user, account) for user in (one, two)]
        unmake: Any = partial(mill.now, remove_member) if way == "remove" else partial(_make_viewer, mill)

        ended = together(
            partial(unmake, callers[0], tenant, two.id), partial(unmake, callers[1], tenant, one.id)
        )

        roles = [row.role for row in mill.tx(accounts.list_members, tenant)]
        assert roles.count("owner") == 1, ended
        assert sum(isinstance(end, Denied | Conflict) for end in ended) == 1, ended


def _make_viewer(mill: Mill, caller: Caller, tenant: str, user_id: str) -> Any:
    return mill.now(set_member, caller, tenant, user_id, Role.VIEWER)


@pytest.mark.threat("A15")
def test_a_token_makes_none_that_can_do_more_or_lasts_longer(client: httpx.Client, mill: Mill) -> None:
    admin = mill.a_member("acme", "admin")

    def made(holder: dict[str, str], *permissions: str, seconds: int = 3600) -> httpx.Response:
        asked = {"name": "t", "permissions": permissions, "expiresInSeconds": seconds}
        return client.post("/api/tokens", json=asked, headers=holder)

    parent = made(admin, "token:create", "build:read").json()
    holder = bearer(parent["token"])

    assert made(holder, "project:delete").status_code == 403
    assert made(holder, "tenant:create").status_code == 400
    child = made(holder, "build:read", seconds=30 * 86400).json()
    assert child["expiresAt"] == parent["expiresAt"]
    assert child["userId"] == parent["userId"]


@pytest.mark.threat("A29")
def test_who_was_removed_and_comes_back_begins_anew(client: httpx.Client, mill: Mill) -> None:
    mill.a_user("owner@acme.test", acme="owner")
    user = mill.a_user(acme="developer")
    asked = {"name": "t", "permissions": ["build:read"]}
    token = client.post("/api/tokens", json=asked, headers=mill.a_login(user)).json()["token"]
    place = f"/api/tenants/{mill.a_tenant()}/members/{user.id}"

    client.delete(place, headers=mill.operator)
    client.put(place, json={"role": "owner"}, headers=mill.operator)

    assert client.get("/api/docker-images", headers=bearer(token)).status_code == 401
    (removed,) = mill.audited("member.removed")
    assert removed.details["tokensRevoked"] == 1


@pytest.mark.threat("A29")
def test_a_project_that_is_made_again_has_nothing_of_the_old_one(client: httpx.Client, mill: Mill) -> None:
    holder = mill.a_member("acme", "owner")
    old = mill.a_project()
    client.put(f"/api/projects/{old}/secrets/TOKEN", json={"value": "not to be told"}, headers=holder)
    client.delete(f"/api/projects/{old}", headers=holder)

    new = mill.a_project()

    assert client.get(f"/api/projects/{new}/secrets", headers=holder).json() == []
    assert client.get(f"/api/projects/{old}/secrets", headers=holder).status_code == 404


# Paths, hosts and methods change nothing about who may


@ON_SQLITE
@pytest.mark.threat("A16")
@pytest.mark.threat("A17")
@pytest.mark.threat("A18")
def test_no_disguise_of_a_request_changes_who_may(
    client: httpx.Client, mill: Mill, app: Starlette, portal: Any
) -> None:
    viewer = mill.a_member("acme", "viewer")
    user = mill.a_user(other="owner")
    targets = [
        b"//api/users", b"/api//users", b"/api/./users", b"/api/x/../users", b"/api/%2e%2e/api/users",
        b"/api/..;/users", b"/%61pi/users", b"/api%2Fusers", b"/api/users;x=.js", b"/api/users/",
        b"/API/users", b"/api/Users", b"/api/users%00", b"/api/users%20", b"/healthz?jsp=/api/users;.jsp",
        b"/docs/../api/users",
        b"/healthz/..;/api/users", b"/api\\users", b"/api/v1/../users", b"@evil.example/api/users",
        b"http://localhost/api/users", b"/api/users/%2e%2e/users/" + user.id.encode(),
    ]  # fmt: skip
    extra = [
        (),
        ((b"x-http-method-override", b"DELETE"),),
        ((b"x-original-url", b"/api/users"),),
        ((b"x-rewrite-url", b"/api/users"),),
        ((b"x-forwarded-host", b"localhost"), (b"x-forwarded-for", b"127.0.0.1")),
        ((b"x-user-id", b"admin"), (b"x-role", b"owner")),
    ]
    for who in ({}, viewer):
        shown = [(name.lower().encode(), value.encode()) for name, value in who.items()]
        for target in targets:
            path, _, query = target.partition(b"?")
            headers = [(b"host", b"localhost"), *shown]
            code, _, content = portal.call(
                carry, app, a_scope("GET", path, query=query, headers=headers), b""
            )
            assert code in (400, 401, 403, 404) and user.email.encode() not in content, (target, content)
        for more in extra:
            for method, path in (("GET", b"/api/users"), ("HEAD", b"/api/users"), ("OPTIONS", b"/api/users")):
                scope = a_scope(method, path, headers=[(b"host", b"localhost"), *shown, *more])
                code, _, content = portal.call(carry, app, scope, b"")
                assert code in (401, 403, 405) and user.email.encode() not in content, (method, more)


# Guessing


@ON_SQLITE
@pytest.mark.threat("A19")
def test_spellings_that_look_alike_are_one_account(
    client: httpx.Client, mill: Mill, settings: Settings
) -> None:
    mill.a_user()
    twins = ["ANN@ACME.TEST", "\uff41nn@acme.test", " ann@acme.test ", "ann@acme.test"]

    guesses = [
        client.post(LOGIN, json={"email": twins[number % len(twins)], "password": "x"}).status_code
        for number in range(settings.login_failures)
    ]

    assert set(guesses) <= {400, 401}
    assert client.post(LOGIN, json={"email": "ann@acme.test", "password": PASSWORD}).status_code == 429


@ON_SQLITE
@pytest.mark.threat("A19")
def test_a_hundred_guesses_at_once_are_no_more_guesses(
    mill: Mill, client: httpx.Client, settings: Settings
) -> None:
    user = mill.a_user()

    def guess(_: int) -> int:
        return client.post(LOGIN, json={"email": user.email, "password": "wrong wrong"}).status_code

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(guess, range(40)))

    assert answers.count(401) == settings.login_failures
    assert answers.count(429) == 40 - settings.login_failures


@ON_SQLITE
@pytest.mark.threat("A19")
def test_with_a_stolen_token_the_password_is_guessed_no_faster(
    client: httpx.Client, owner: MadeUser, settings: Settings
) -> None:
    holder = bearer(log_in(client, owner)["token"])

    def guess(password: str) -> int:
        body = {"current_password": password, "new_password": OTHER_PASSWORD}
        return client.post("/api/v1/auth/password", json=body, headers=holder).status_code

    guesses = [guess("wrong") for _ in range(settings.login_failures)]

    assert set(guesses) == {403}
    assert guess(PASSWORD) == 429


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How much work each comparison of a password was, by the parameters of the hash."""
    done: list[int] = []
    verify = PasswordHasher.verify

    def counting(self: PasswordHasher, stored: Any, password: Any) -> bool:
        done.append(int(str(stored).split("$")[3].split(",")[0].removeprefix("m=")))
        return bool(verify(self, stored, password))

    monkeypatch.setattr(PasswordHasher, "verify", counting)
    yield done


@ON_SQLITE
@pytest.mark.threat("A20")
def test_nobody_learns_who_has_an_account(client: httpx.Client, mill: Mill, compared: list[int]) -> None:
    mill.a_user()
    gone = mill.a_user("gone@acme.test")
    client.patch(f"/api/users/{gone.id}", json={"isDisabled": True}, headers=mill.operator)
    told, work = [], []

    for email in ("ann@acme.test", "nobody@acme.test", "gone@acme.test", "no address at all"):
        compared.clear()
        answer = client.post(LOGIN, json={"email": email, "password": "wrong wrong wrong"})
        body = {name: text for name, text in answer.json().items() if name not in ("timestamp", "trace_id")}
        told.append((answer.status_code, {**answer.headers}, body))
        work.append(tuple(compared))

    assert told[0][0] == 401
    assert told == [told[0]] * 4
    assert work == [(64 * 1024,)] * 4


@ON_SQLITE
@pytest.mark.threat("A21")
def test_a_password_is_compared_whole_and_never_too_long(client: httpx.Client, owner: MadeUser) -> None:
    long = "x" * 70 + "0123456789"
    stored = hash_password(long)

    assert is_password(stored, long)
    assert not is_password(stored, long[:72])
    assert not is_password(stored, long + "\0")
    assert not is_password(stored, long + "x" * 1000)
    for password in ("x" * 1_000_000, "x" * 1025, ""):
        answer = client.post(LOGIN, json={"email": owner.email, "password": password})
        assert answer.status_code in (400, 413)
        assert "xxxx" not in answer.text
    for password in (f"{PASSWORD}\0", f"{PASSWORD}\0more"):
        answer = client.post(LOGIN, json={"email": owner.email, "password": password})
        assert answer.status_code in (400, 401)
    with pytest.raises(WeakPassword):
        hash_password("\ufdfa" * 100)  # one letter that stands for eighteen


# From other pages


@ON_SQLITE
@pytest.mark.threat("A26")
def test_a_page_of_somebody_else_logs_nobody_in_and_changes_nothing(
    client: httpx.Client, mill: Mill, owner: MadeUser
) -> None:
    holder = mill.a_login(owner)
    body = json.dumps({"email": owner.email, "password": PASSWORD})
    forms = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None)

    for media_type in forms:
        headers = {"Content-Type": media_type} if media_type else {}
        for path in (LOGIN, "/api/v1/auth/password", "/api/projects"):
            answer = client.post(path, content=body, headers={**headers, **holder})
            assert answer.status_code == 415, (path, media_type)
    login = client.post(LOGIN, content=body, headers={"Content-Type": "application/json"})
    assert "set-cookie" not in login.headers
    cookies = {"Cookie": f"token={login.json()['token']}; session={login.json()['token']}"}
    assert client.get(ME, headers=cookies).status_code == 401


@ON_SQLITE
@pytest.mark.threat("A27")
@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example", "%0d%0aSet-Cookie:a=b", "/%5cevil.example", "/ok"]
)
def test_a_login_leads_nowhere(client: httpx.Client, owner: MadeUser, target: str) -> None:
    body = {"email": owner.email, "password": PASSWORD}

    for name in ("next", "redirect", "return_to", "url"):
        answer = client.post(f"{LOGIN}?{name}={target}", json=body)
        assert answer.status_code == 400
        assert client.post(LOGIN, json={**body, name: target}).status_code == 400
        assert not {"location", "set-cookie", "refresh"} & set(answer.headers)


# At the same moment


@pytest.mark.threat("A30")
def test_of_ten_who_take_the_same_name_one_gets_it(mill: Mill) -> None:
    site, hashed = mill.site, hash_password(PASSWORD)
    takers: dict[str, Callable[[], Any]] = {
        "tenant": lambda: mill.now(create_tenant, LOCAL, account="wanted"),
        "image": lambda: mill.now(
            create_image, site, LOCAL, slug="wanted", image_url="busybox:1", public=False
        ),
        "user": lambda: mill.now(
            create_user, LOCAL, email="wanted@a.test", name="", password_hash=hashed, is_admin=False
        ),
    }

    for name, take in takers.items():
        ended = together(*[take] * 10)
        assert sum(isinstance(end, AlreadyExists) for end in ended) == 9, (name, ended)


@pytest.mark.threat("A09")
def test_two_windows_that_refresh_at_once_both_go_on(mill: Mill, client: httpx.Client) -> None:
    user = mill.a_user()
    token = log_in(client, user)["refresh_token"]

    for _ in range(5):
        ended: list[Any] = together(
            *[lambda token=token: mill.now(refresh_login, mill.site, token, address="127.0.0.1")] * 4
        )
        following = {end.refresh_token for end in ended}
        assert len(following) == 1, ended
        assert all(client.get(ME, headers=bearer(end.token)).status_code == 200 for end in ended)
        (token,) = following


@pytest.mark.threat("A09")
def test_a_thief_of_a_refresh_token_is_found_out(mill: Mill, client: httpx.Client) -> None:
    """The thief is quick, and goes on twice before the user comes again."""
    user = mill.a_user()

    def refresh(token: str) -> httpx.Response:
        return client.post(REFRESH, json={"refresh_token": token})

    stolen = log_in(client, user)["refresh_token"]
    of_user = refresh(stolen).json()["refresh_token"]
    thief = refresh(stolen).json()
    mill.clock.advance(60)
    thief = refresh(thief["refresh_token"]).json()
    mill.clock.advance(60)

    assert refresh(of_user).status_code == 401
    assert client.get(ME, headers=bearer(thief["token"])).status_code == 401
    assert refresh(thief["refresh_token"]).status_code == 401
    assert len(mill.audited("login.reused")) == 1


@ON_POSTGRES
@pytest.mark.threat("A09")
def test_a_password_that_the_operator_sets_stays_set(mill: Mill) -> None:
    """A thief who knows the old one changes it at the same moment."""
    thiefs, operators = hash_password(OTHER_PASSWORD), hash_password("the operator has set this")
    for number in range(10):
        user = mill.a_user(f"user{number}@acme.test", acme="viewer")
        caller, before = as_member(mill, user), mill.tx(accounts.get_user, user.id).password_hash

        together(
            lambda caller=caller, before=before: mill.now(change_password, caller, before, thiefs),
            lambda user=user: mill.now(change_user, LOCAL, user.id, UserChanges(password_hash=operators)),
        )

        assert mill.tx(accounts.get_user, user.id).password_hash == operators


@pytest.mark.threat("A09")
def test_a_token_made_while_its_user_is_disabled_does_not_count(client: httpx.Client, mill: Mill) -> None:
    mill.a_user("owner@acme.test", acme="owner")
    user = mill.a_user(acme="developer")
    holder = mill.a_login(user)
    asked = {"name": "t", "permissions": ["build:read"]}

    made, _ = together(
        lambda: client.post("/api/tokens", json=asked, headers=holder),
        lambda: client.patch(f"/api/users/{user.id}", json={"isDisabled": True}, headers=mill.operator),
    )

    assert isinstance(made, httpx.Response)
    if made.status_code == 201:
        token = bearer(made.json()["token"])
        assert client.get("/api/docker-images", headers=token).status_code == 401


# What the trail says, and whose it is


@pytest.mark.threat("A15")
def test_the_trail_of_a_tenant_has_what_concerns_it_and_nothing_of_others(
    client: httpx.Client, mill: Mill
) -> None:
    mill.a_user("owner@acme.test", acme="owner")
    here = {**mill.operator, "X-Tenant-ID": mill.a_tenant("acme")}
    client.post("/api/users", json={"email": "new@other.test"}, headers=here)
    client.post("/api/tenants", json={"accountId": "fresh"}, headers=here)
    user = mill.a_user("bob@acme.test", acme="viewer", other="viewer")
    client.patch(f"/api/users/{user.id}", json={"name": "Bob"}, headers=here)
    for account in ("acme", "other"):
        place = f"/api/tenants/{mill.a_tenant(account)}/members/{user.id}"
        client.put(place, json={"role": "developer"}, headers=mill.operator)
        client.delete(place, headers=mill.operator)

    tenants = {mill.a_tenant(name): name for name in ("acme", "other", "fresh")}
    rows = {(row.action, tenants.get(row.tenant_id or "")) for row in mill.audited()}

    assert {row for row in rows if row[0].startswith("user.")} == {
        ("user.created", None),
        ("user.changed", None),
    }
    assert {row for row in rows if row[0] == "tenant.created"} == {("tenant.created", "fresh")}
    for action in ("member.added", "member.changed", "member.removed"):
        assert {row for row in rows if row[0] == action} == {(action, "acme"), (action, "other")}
