"""What this runner brought to the engine goes when nobody needs it; what others brought never does."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import pytest

from runner.executor.docker import DockerExecutor, open_docker
from tests.engine.registry import a_registry

pytestmark = pytest.mark.engine

LATER_S = 10_000.0


@pytest.fixture
def api() -> Iterator[Any]:
    made = docker.APIClient(version="auto")
    with contextlib.closing(made):
        yield made


@pytest.fixture
def registry(api) -> Iterator[str]:
    """The host part of images that can be pulled; each test has names of its own by its port."""
    with a_registry() as (_, host):
        yield host
        for found in api.images(all=True):
            for name in [*(found["RepoTags"] or []), *(found["RepoDigests"] or [])]:
                if name.startswith((host, "buildmill-keeping-")):
                    with contextlib.suppress(docker.errors.APIError):
                        api.remove_image(name, force=True)


class Clock:
    """The wall's clock, or one that is ahead of it."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@pytest.fixture
def open_with(runner: str, tmp_path: Path) -> Iterator[Any]:
    with contextlib.ExitStack() as stack:

        def open_it(**wishes: Any) -> DockerExecutor:
            made = open_docker(runner=runner, state=tmp_path, environ=os.environ, holders_ahead=0, **wishes)
            made._housekeeping._clock = clock
            stack.callback(made.close)
            return made

        clock = Clock()
        open_it.clock = clock
        tmp_path.mkdir(exist_ok=True)
        yield open_it


def pull(executor: DockerExecutor, image: str) -> None:
    executor.pull(image, deadline_s=60, progress=lambda line: None)


def offered(executor: DockerExecutor, *wanted: str) -> list[str]:
    return [spare.name for spare in executor.spares(wanted)]


def is_here(api: Any, image: str) -> bool:
    try:
        api.inspect_image(image)
    except docker.errors.ImageNotFound:
        return False
    return True


def test_an_image_that_was_pulled_and_long_unused_is_offered_and_goes(open_with, registry, api) -> None:
    executor, image = open_with(), f"{registry}/good/image:1"
    pull(executor, f"docker://{image}")
    young = offered(executor)
    open_with.clock.ahead_s = LATER_S

    [spare] = executor.spares([])

    assert young == []
    assert (spare.kind, spare.name) == ("image", image)
    assert spare.remove()
    assert not is_here(api, image)
    assert offered(executor) == []


def test_a_runner_that_was_restarted_knows_its_images(open_with, registry) -> None:
    image = f"{registry}/good/image"
    pull(open_with(), image)
    open_with.clock.ahead_s = LATER_S

    assert offered(open_with()) == [f"{image}:latest"]


def test_an_image_that_the_operator_brought_is_never_offered(open_with, registry, api) -> None:
    brought = f"{registry}/good/image:brought"
    list(api.pull(f"{registry}/good/image", tag="brought", stream=True))
    executor = open_with()
    pull(executor, brought)
    open_with.clock.ahead_s = LATER_S

    assert offered(executor) == []


def test_an_image_that_somebody_has_given_another_name_stays(open_with, registry, api) -> None:
    executor, image = open_with(), f"{registry}/good/image:1"
    pull(executor, image)
    api.tag(image, f"buildmill-keeping-{uuid.uuid4().hex[:8]}", tag="mine")
    open_with.clock.ahead_s = LATER_S

    assert offered(executor) == []


def test_another_image_under_a_name_that_we_pulled_is_somebody_elses(open_with, registry, api) -> None:
    executor, image = open_with(), f"{registry}/good/image:1"
    pull(executor, image)
    api.tag("buildmill/busybox:1", f"{registry}/good/image", tag="1")
    open_with.clock.ahead_s = LATER_S

    assert offered(executor) == []
    assert is_here(api, image)


def test_an_image_that_is_wanted_pinned_or_in_a_container_stays(open_with, registry, api) -> None:
    executor, image = open_with(), f"{registry}/good/image:1"
    pull(executor, image)
    open_with.clock.ahead_s = LATER_S
    assert offered(executor) == [image]

    wanted = offered(executor, f"docker://{image}")
    pinned = offered(open_with(keep_images=[f"{registry}/good/*"]))
    container = api.create_container(image, command=["/hello"])
    used = offered(executor)
    api.remove_container(container)

    assert (wanted, pinned, used) == ([], [], [])


def test_an_image_that_came_into_use_since_it_was_offered_is_not_removed(open_with, registry, api) -> None:
    executor, image = open_with(), f"{registry}/good/image:1"
    pull(executor, image)
    open_with.clock.ahead_s = LATER_S
    [spare] = executor.spares([])
    container = api.create_container(image, command=["/hello"])

    removed = spare.remove()

    api.remove_container(container)
    assert not removed
    assert is_here(api, image)


def test_an_image_that_was_rebuilt_or_named_since_it_was_offered_is_not_removed(
    open_with, registry, api
) -> None:
    executor, rebuilt, named = open_with(), f"{registry}/good/image:1", f"{registry}/good/image:2"
    pull(executor, rebuilt)
    open_with.clock.ahead_s = LATER_S
    [first] = executor.spares([])
    api.tag("buildmill/busybox:1", f"{registry}/good/image", tag="1")

    was_removed = first.remove()

    assert not was_removed
    assert is_here(api, rebuilt)
    open_with.clock.ahead_s = 0.0
    pull(executor, named)
    open_with.clock.ahead_s = LATER_S
    [second] = executor.spares([])
    api.tag(named, f"buildmill-keeping-{uuid.uuid4().hex[:8]}", tag="mine")
    assert not second.remove()
    assert is_here(api, named)


def test_an_image_is_wanted_under_every_spelling_of_its_name(open_with, registry, api) -> None:
    executor, image = open_with(), f"{registry}/good/image"
    pull(executor, image)
    digest = api.inspect_image(image)["RepoDigests"][0]
    open_with.clock.ahead_s = LATER_S

    assert offered(executor) == [f"{image}:latest"]
    assert offered(executor, f"docker://{image}:latest") == []
    assert offered(executor, digest, "no such image!") == []
    assert offered(open_with(keep_images=[f"{registry}/good/image:*"])) == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": [1]}', '{"images": [{"id": "x"}]}'])
def test_with_a_damaged_record_no_image_is_removed(open_with, registry, tmp_path, content) -> None:
    pull(open_with(), f"{registry}/good/image:1")
    (tmp_path / "images.json").write_text(content)
    open_with.clock.ahead_s = LATER_S

    assert offered(open_with()) == []


def test_the_engines_folder_is_known_where_it_is_on_this_machine(open_with, api) -> None:
    assert open_with().storage() == Path(api.info()["DockerRootDir"])


# --- strays --------------------------------------------------------------------------------------------


def ours(runner: str, step: str = "step-1") -> dict[str, str]:
    return {
        "buildmill.managed": "1",
        "buildmill.runner": runner,
        "buildmill.step": step,
        "buildmill.attempt": "1",
    }


@pytest.fixture
def strays(api, runner) -> Iterator[Any]:
    """Makes a volume and a network with these labels; they are named by what is left of them."""
    made: list[str] = []

    def make(name: str, labels: dict[str, str]) -> None:
        full = f"buildmill-test-{runner}-{name}"
        api.create_volume(full, labels=labels)
        api.create_network(full, "bridge", labels=labels)
        made.append(full)

    yield make
    for name in made:
        with contextlib.suppress(docker.errors.APIError):
            api.remove_volume(name)
        with contextlib.suppress(docker.errors.APIError):
            api.remove_network(name)


def left(api: Any, runner: str) -> tuple[list[str], list[str]]:
    prefix = f"buildmill-test-{runner}-"
    volumes = [one["Name"] for one in api.volumes()["Volumes"] or []]
    networks = [one["Name"] for one in api.networks()]
    return tuple(
        sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        for names in (volumes, networks)
    )


def test_volumes_and_networks_of_ours_that_no_attempt_in_hand_owns_are_removed(
    executor, api, runner, strays
) -> None:
    strays("over", ours(runner, "over"))
    strays("held", ours(runner, "held"))
    strays("another-runners", ours(f"{runner}x", "over"))
    strays("somebodys", {"buildmill.runner": runner})

    executor.remove_strays({("held", 1)})

    kept = ["another-runners", "held", "somebodys"]
    assert left(api, runner) == (kept, kept)


def test_what_is_in_use_stays_and_stops_nothing_else(executor, api, runner, strays) -> None:
    strays("in-use", ours(runner))
    strays("over", ours(runner))
    name = f"buildmill-test-{runner}-in-use"
    host = api.create_host_config(binds=[f"{name}:/data"])
    container = api.create_container("buildmill/busybox:1", command=["true"], host_config=host)

    executor.remove_strays(set())

    volumes, networks = left(api, runner)
    api.remove_container(container)
    assert volumes == ["in-use"]
    assert networks == []


def test_a_holder_that_nobody_has_joined_for_long_is_removed_and_one_that_is_ready_stays(
    executor, api, runner
) -> None:
    lost = executor._make_holder("none")
    assert executor._holders.wait_until_full(10)
    ready = set(executor._holders.list_ready())
    executor.remove_strays(set())
    fresh = {found["Id"] for found in executor._list("holder", f"buildmill.runner={runner}")}
    clock = Clock()
    clock.ahead_s = LATER_S
    executor._housekeeping._clock = clock

    executor.remove_strays(set())

    kept = {found["Id"] for found in executor._list("holder", f"buildmill.runner={runner}")}
    assert lost in fresh
    assert lost not in kept
    assert ready <= kept
