"""Chooses the login that goes with a pull: that of exactly the image's own registry, or none."""

from collections.abc import Mapping
from typing import Final

from runner.credentials import RegistryLogin

HUB: Final = "docker.io"
# The engine reads these as the one registry whose images carry no host.
HUB_NAMES: Final = frozenset({HUB, "index.docker.io"})


def find_login(repository: str, logins: Mapping[str, RegistryLogin]) -> dict[str, str] | None:
    """What the engine is handed for this pull; the engine asks the registry itself for a token with it."""
    host = find_host(repository)
    for written, login in logins.items():
        if host == (HUB if written in HUB_NAMES else written):
            return {"username": login.username, "password": login.password, "serveraddress": host}
    return None


def find_host(repository: str) -> str:
    """The registry that the engine asks for this name, port included.

    Engines differ in whether a first part with capitals is a host: it is taken for one, which is safe.
    """
    first, slash, _ = repository.partition("/")
    is_host = bool(slash) and ("." in first or ":" in first or first == "localhost" or first != first.lower())
    host = first.lower() if is_host else HUB
    return HUB if host in HUB_NAMES else host
