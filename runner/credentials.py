"""The machine's own logins for git hosts and image registries, read from one private file.

    [git."github.com"]
    token = "..."                  # for https; `username` where the host wants a certain one
    ssh_key = "/etc/buildmill/id"  # for ssh; `known_hosts` where the machine does not know the host

    [registry."ghcr.io"]
    username = "..."
    password = "..."

A login goes to exactly the host it is written for, port included, and to no other.
"""

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runner.errors import BadSetup

DEFAULT_GIT_USER = "x-access-token"
MIN_SECRET_LENGTH = 8


@dataclass(frozen=True)
class GitLogin:
    """How to log in at one git host."""

    token: str = field(default="", repr=False)
    username: str = DEFAULT_GIT_USER
    ssh_key: Path | None = None
    known_hosts: Path | None = None


@dataclass(frozen=True)
class RegistryLogin:
    """How to log in at one image registry."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Credentials:
    """All logins of this machine, by exact host."""

    git: Mapping[str, GitLogin] = field(default_factory=dict)
    registry: Mapping[str, RegistryLogin] = field(default_factory=dict)

    def secrets(self) -> list[str]:
        """What must never show in a log, longest first."""
        found = {login.token for login in self.git.values()}
        found |= {login.password for login in self.registry.values()}
        return sorted(filter(None, found), key=lambda secret: (-len(secret), secret))


def load_credentials(path: Path | None) -> Credentials:
    """Read the file; a file that others may read is refused, no file means no logins."""
    if path is None:
        return Credentials()
    tables = _read_private_toml(path)
    unknown = tables.keys() - {"git", "registry"}
    if unknown:
        raise BadSetup(f"{path} has the unknown table {sorted(unknown)[0]!r}; known are git and registry")
    git = {
        host: _git_login(path, host, entry) for host, entry in _hosts(path, tables.get("git", {}), GIT_FIELDS)
    }
    registry = {
        host: _registry_login(path, host, entry)
        for host, entry in _hosts(path, tables.get("registry", {}), REGISTRY_FIELDS)
    }
    return Credentials(git, registry)


GIT_FIELDS = frozenset({"token", "username", "ssh_key", "known_hosts"})
REGISTRY_FIELDS = frozenset({"username", "password"})


def _read_private_toml(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_mode & 0o077:
                raise BadSetup(f"{path} can be read by other users; run `chmod 600 {path}`")
            if found.st_uid not in (os.geteuid(), 0):
                raise BadSetup(f"{path} belongs to another user; run `chown {os.geteuid()} {path}`")
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise BadSetup(f"{path} is not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise BadSetup(f"{path} is not UTF-8") from error
    except OSError as error:
        raise BadSetup(f"{path} cannot be read: {error.strerror}") from error


def _hosts(path: Path, table: object, fields: frozenset[str]) -> list[tuple[str, dict[str, str]]]:
    if not isinstance(table, dict):
        raise BadSetup(f"{path}: logins are written as tables, one for each host")
    hosts: list[tuple[str, dict[str, str]]] = []
    for host, entry in table.items():
        if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
            raise BadSetup(f"{path}: the entry of {host!r} has to be a table of texts")
        unknown = entry.keys() - fields
        if unknown:
            raise BadSetup(f"{path}: {host!r} has the unknown field {sorted(unknown)[0]!r}")
        if any("\n" in value or "\0" in value for value in entry.values()):
            raise BadSetup(f"{path}: {host!r} has a line break in a value")
        hosts.append((host.lower(), entry))
    return hosts


def _git_login(path: Path, host: str, entry: dict[str, str]) -> GitLogin:
    token, key = entry.get("token", ""), entry.get("ssh_key", "")
    if not token and not key:
        raise BadSetup(f"{path}: git host {host!r} needs a token or an ssh_key")
    _check_secret(path, host, token)
    return GitLogin(
        token,
        entry.get("username", DEFAULT_GIT_USER),
        _key_file(path, host, key),
        Path(entry["known_hosts"]) if "known_hosts" in entry else None,
    )


def _registry_login(path: Path, host: str, entry: dict[str, str]) -> RegistryLogin:
    if not entry.get("username") or not entry.get("password"):
        raise BadSetup(f"{path}: registry {host!r} needs a username and a password")
    _check_secret(path, host, entry["password"])
    return RegistryLogin(entry["username"], entry["password"])


def _check_secret(path: Path, host: str, secret: str) -> None:
    if secret and len(secret) < MIN_SECRET_LENGTH:
        raise BadSetup(f"{path}: the secret of {host!r} is too short to be kept out of logs")


def _key_file(path: Path, host: str, key: str) -> Path | None:
    if not key:
        return None
    if not Path(key).is_absolute() or not Path(key).is_file():
        raise BadSetup(f"{path}: the ssh_key of {host!r} has to be the absolute path of a file")
    return Path(key)
