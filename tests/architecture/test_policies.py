"""Every route says who may use it, and docs/security.md says the same."""

import re
from pathlib import Path

from coordinator.app import ALL_ENDPOINTS
from coordinator.rules.access import Audience, Policy, Scope
from coordinator.rules.permissions import GRANTABLE, OF_THE_OPERATOR, PERMISSIONS, Role

SECURITY = Path(__file__).parents[2] / "docs" / "security.md"
ROW = re.compile(r"^\| `([a-z]+:[a-z]+)` \| ([a-z]+) \| (.+) \|$", re.MULTILINE)


def documented() -> dict[str, str]:
    """Permission to audience, as the page tells them."""
    return {permission: audience for permission, audience, _ in ROW.findall(SECURITY.read_text())}


def test_every_route_declares_its_policy() -> None:
    for endpoint in ALL_ENDPOINTS:
        assert isinstance(endpoint.policy, Policy), endpoint.name
        assert isinstance(endpoint.policy.audience, Audience), endpoint.name


def test_every_permission_is_documented_with_its_audience_and_no_other_is() -> None:
    used: dict[str, str] = {}
    for endpoint in ALL_ENDPOINTS:
        before = used.setdefault(endpoint.policy.permission, endpoint.policy.audience)
        assert before == endpoint.policy.audience, f"{endpoint.policy.permission} is for two audiences"

    assert documented() == used


def test_everybody_gets_nothing_but_health_and_the_specification() -> None:
    for endpoint in ALL_ENDPOINTS:
        if endpoint.policy.audience is Audience.ANYONE:
            assert endpoint.policy.permission in (
                "health:read",
                "specification:read",
                "login:create",
            ), endpoint.path


def test_what_changes_something_is_not_called_reading() -> None:
    for endpoint in ALL_ENDPOINTS:
        verb = endpoint.policy.permission.partition(":")[2]
        only_reads = endpoint.method in ("GET", "HEAD")
        if verb in ("read", "list"):
            assert only_reads, endpoint.path
        elif verb != "work":
            assert not only_reads, endpoint.path


def test_no_two_routes_answer_the_same_question() -> None:
    places = [(endpoint.method, endpoint.path) for endpoint in ALL_ENDPOINTS]

    assert len(places) == len(set(places))


def test_the_permissions_of_each_role_are_documented() -> None:
    rows = re.findall(
        r"^\| (viewer|developer|admin|operator) \| (.+) \|$", SECURITY.read_text(), re.MULTILINE
    )
    said = {role: set(re.findall(r"`([a-z]+:[a-z]+)`", text)) for role, text in rows}

    own = {
        "viewer": PERMISSIONS[Role.VIEWER],
        "developer": PERMISSIONS[Role.DEVELOPER] - PERMISSIONS[Role.VIEWER],
        "admin": PERMISSIONS[Role.ADMIN] - PERMISSIONS[Role.DEVELOPER],
        "operator": OF_THE_OPERATOR,
    }
    assert said == own


def test_every_permission_of_users_is_in_somebodys_hands() -> None:
    given = GRANTABLE | OF_THE_OPERATOR
    for endpoint in ALL_ENDPOINTS:
        policy = endpoint.policy
        if policy.audience in (Audience.USER, Audience.STEP) and policy.scope is not Scope.NOTHING:
            assert policy.permission in given, policy.permission
            assert (policy.scope is Scope.INSTALLATION) == (policy.permission in OF_THE_OPERATOR)
