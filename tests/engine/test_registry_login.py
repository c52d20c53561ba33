"""Private images: the login goes to the registry it is written for, to no other and into no log."""

import base64
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from runner.credentials import RegistryLogin
from runner.errors import StepError
from runner.executor.docker import DockerExecutor, open_docker
from shared.reasons import Reason
from tests.engine.registry import Registry, a_registry, basic, digest_of

pytestmark = pytest.mark.engine

LOGIN = ("builder", "the-private-password")


@pytest.fixture
def private() -> Iterator[tuple[Registry, str]]:
    with a_registry(login=LOGIN) as (registry, host):
        yield registry, host


@pytest.fixture
def open_with(runner: str, tmp_path: Path) -> Iterator:
    """An executor with these logins."""
    with contextlib.ExitStack() as stack:

        def open_it(logins: dict[str, RegistryLogin]) -> DockerExecutor:
            made = open_docker(
                runner=runner, state=tmp_path / "state", environ=os.environ, holders_ahead=0, logins=logins
            )
            made._pulls._pause_s = 0.01
            stack.callback(made.close)
            return made

        yield open_it


def forget(image: str) -> None:
    api = docker.APIClient(version="auto")
    with contextlib.closing(api), contextlib.suppress(docker.errors.NotFound):
        api.remove_image(image)


def assert_nowhere(password: str, *texts: str) -> None:
    for text in texts:
        assert password not in text
        assert base64.b64encode(password.encode()).decode().rstrip("=") not in text


def test_a_private_image_is_pulled_with_the_login_of_its_registry(open_with, private, capfd) -> None:
    registry, host = private
    image, lines = f"{host}/good/image:1", []

    try:
        digest = open_with({host: RegistryLogin(*LOGIN)}).pull(image, deadline_s=60, progress=lines.append)
    finally:
        forget(image)

    assert digest == f"{host}/good/image@{digest_of(registry.manifest)}"
    assert_nowhere(LOGIN[1], *lines, *capfd.readouterr())


@pytest.mark.parametrize("password", [None, "another-password"])
def test_without_the_right_login_the_image_is_denied(open_with, private, password, capfd) -> None:
    _, host = private
    logins = {host: RegistryLogin(LOGIN[0], password)} if password else {}
    lines: list[str] = []

    with pytest.raises(StepError) as caught:
        open_with(logins).pull(f"{host}/good/image:1", deadline_s=60, progress=lines.append)

    assert caught.value.reason is Reason.IMAGE_DENIED
    assert_nowhere("another-password", caught.value.detail, *lines, *capfd.readouterr())


@pytest.mark.threat("K05")
def test_a_registry_that_points_to_anothers_tokens_gets_nobodys_login(open_with, private) -> None:
    registry, host = private
    lure = f'Bearer realm="http://{host}/token",service="{host}"'
    with a_registry(login=("nobody", "nothing-at-all"), challenge=lure) as (evil, evil_host):
        with pytest.raises(StepError):
            open_with({host: RegistryLogin(*LOGIN)}).pull(
                f"{evil_host}/good/image:1", deadline_s=60, progress=lambda line: None
            )

        assert basic(*LOGIN) not in registry.authorizations | evil.authorizations
