import contextlib

import docker
import pytest

from runner.errors import StepError
from shared.reasons import Reason
from tests.engine.registry import a_registry, digest_of

pytestmark = pytest.mark.engine


@pytest.fixture
def registry():
    with a_registry() as (registry, host):
        yield registry, host


def test_an_image_is_pulled_once_and_its_digest_told(executor, registry) -> None:
    served, host = registry
    lines: list[str] = []
    image = f"{host}/good/image:1"
    try:
        first = executor.pull(image, deadline_s=60, progress=lines.append)
        asked = len(served.asked)
        second = executor.pull(f"docker://{image}", deadline_s=60, progress=lines.append)
    finally:
        api = docker.APIClient(version="auto")
        with contextlib.closing(api), contextlib.suppress(docker.errors.NotFound):
            api.remove_image(image)

    assert first == second == f"{host}/good/image@{digest_of(served.manifest)}"
    assert len(served.asked) == asked
    assert lines and all(image in line for line in lines)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing/image:1", Reason.IMAGE_NOT_FOUND),
        ("denied/image:1", Reason.IMAGE_DENIED),
        ("broken/image:1", Reason.PULL_NETWORK),
    ],
)
def test_what_a_registry_refuses_has_a_reason(executor, registry, name, reason) -> None:
    executor._pulls._pause_s = 0.01
    with pytest.raises(StepError) as caught:
        executor.pull(f"{registry[1]}/{name}", deadline_s=60, progress=lambda line: None)

    assert caught.value.reason is reason


def test_a_registry_that_is_not_there_is_a_network_failure(executor) -> None:
    executor._pulls._pause_s = 0.01
    with pytest.raises(StepError) as caught:
        executor.pull("127.0.0.1:1/x/y:1", deadline_s=60, progress=lambda line: None)

    assert caught.value.reason is Reason.PULL_NETWORK


def test_a_registry_that_does_not_answer_costs_no_more_than_the_deadline(executor, registry) -> None:
    with pytest.raises(StepError) as caught:
        executor.pull(f"{registry[1]}/slow/image:1", deadline_s=0.5, progress=lambda line: None)

    assert caught.value.reason is Reason.PULL_TIMEOUT


def test_a_name_that_is_no_reference_is_the_user_error(executor) -> None:
    with pytest.raises(StepError) as caught:
        executor.pull("Not A Reference!", deadline_s=60, progress=lambda line: None)

    assert caught.value.reason is Reason.BAD_CONFIG
