from pathlib import Path

import pytest

from runner.credentials import load_credentials
from runner.errors import BadSetup

WHOLE = """
[git."GitHub.com"]
token = "git-token-1234"

[git."git.example.test:8443"]
token = "other-token-99"
username = "builder"

[registry."ghcr.io"]
username = "me"
password = "registry-pass-1"
"""


def a_file(folder: Path, text: str, *, mode: int = 0o600) -> Path:
    path = folder / "credentials.toml"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_logins_are_read_by_exact_host(tmp_path: Path) -> None:
    found = load_credentials(a_file(tmp_path, WHOLE))

    assert found.git["github.com"].token == "git-token-1234"
    assert found.git["git.example.test:8443"].username == "builder"
    assert "git.example.test" not in found.git
    assert found.registry["ghcr.io"].password == "registry-pass-1"


def test_no_secret_shows_when_credentials_are_printed(tmp_path: Path) -> None:
    found = load_credentials(a_file(tmp_path, WHOLE))

    assert set(found.secrets()) == {"git-token-1234", "other-token-99", "registry-pass-1"}
    assert not [secret for secret in found.secrets() if secret in repr(found)]


def test_no_file_means_no_logins() -> None:
    found = load_credentials(None)

    assert (found.git, found.registry, found.secrets()) == ({}, {}, [])


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o602])
def test_a_file_that_others_can_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    with pytest.raises(BadSetup, match="chmod 600"):
        load_credentials(a_file(tmp_path, WHOLE, mode=mode))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not toml", "not valid TOML"),
        ("[other]\nx = 1", "unknown table 'other'"),
        ("[git]\nx = 1", "has to be a table"),
        ('[git."h"]\npassword = "x"', "unknown field 'password'"),
        ('[git."h"]\nusername = "x"', "needs a token or an ssh_key"),
        ('[git."h"]\ntoken = "short"', "too short"),
        ('[git."h"]\ntoken = "with\\nbreak"', "line break"),
        ('[git."h"]\nssh_key = "relative"', "absolute path"),
        ('[registry."h"]\nusername = "x"', "needs a username and a password"),
    ],
)
def test_a_mistake_is_named_without_showing_a_secret(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BadSetup, match=said):
        load_credentials(a_file(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="cannot be read"):
        load_credentials(tmp_path / "nothing")
