"""A login goes to the registry it is written for, and to no other."""

import pytest

from runner.credentials import RegistryLogin
from runner.executor.logins import find_login

LOGINS = {
    "ghcr.example": RegistryLogin("someone", "the-password"),
    "registry.example:5000": RegistryLogin("another", "another-password"),
    "docker.io": RegistryLogin("hub", "hub-password"),
}


@pytest.mark.parametrize(
    ("repository", "username"),
    [
        ("ghcr.example/team/app", "someone"),
        ("GHCR.example/team/app", "someone"),
        ("registry.example:5000/app", "another"),
        ("busybox", "hub"),
        ("library/busybox", "hub"),
        ("docker.io/library/busybox", "hub"),
        ("index.docker.io/library/busybox", "hub"),
    ],
)
def test_a_pull_carries_the_login_of_its_registry(repository: str, username: str) -> None:
    found = find_login(repository, LOGINS)

    assert found is not None
    assert found["username"] == username


@pytest.mark.threat("K05")
@pytest.mark.parametrize(
    "repository",
    [
        "ghcr.example.evil.example/team/app",
        "evil.example/ghcr.example/app",
        "ghcr.example:443/team/app",
        "ghcr.example:5000/app",
        "sub.ghcr.example/app",
        "registry.example/app",
        "registry.example:50000/app",
        "xghcr.example/app",
        "localhost/app",
        "localhost:5000/docker.io/app",
        "EVIL/app",
    ],
)
def test_another_registry_gets_none(repository: str) -> None:
    assert find_login(repository, LOGINS) is None


def test_where_nothing_is_written_nothing_is_sent() -> None:
    assert find_login("busybox", {}) is None
