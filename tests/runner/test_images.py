"""Names of images are compared as the engine lists them."""

import pytest

from runner.executor.images import PulledImages, registry_of, repository_of, spellings_of, with_tag


@pytest.mark.parametrize(
    ("reference", "listed"),
    [
        ("busybox", "busybox:latest"),
        ("busybox:1", "busybox:1"),
        ("docker.io/library/busybox:1", "busybox:1"),
        ("docker.io/team/app", "team/app:latest"),
        ("registry.example:5000/app", "registry.example:5000/app:latest"),
        ("registry.example:5000/app:2", "registry.example:5000/app:2"),
        ("app@sha256:00", "app@sha256:00"),
        ("index.docker.io/library/app:1@sha256:00", "app@sha256:00"),
        ("index.example/app:1", "index.example/app:1"),
    ],
)
def test_a_reference_is_known_as_the_engine_lists_it(reference: str, listed: str) -> None:
    assert with_tag(reference) == listed


@pytest.mark.parametrize(
    ("reference", "repository"),
    [
        ("busybox:1", "busybox"),
        ("registry.example:5000/team/app:2", "registry.example:5000/team/app"),
        ("registry.example:5000/app@sha256:00", "registry.example:5000/app"),
    ],
)
def test_a_repository_is_what_is_left_without_tag_and_digest(reference: str, repository: str) -> None:
    assert repository_of(reference) == repository


def test_the_record_survives_a_restart_in_the_order_of_use(tmp_path) -> None:
    now = [1000.0]
    images = PulledImages(tmp_path / "images.json", clock=lambda: now[0])
    for name in ("first", "second", "third"):
        images.note_pulled(name, f"id-{name}")
        now[0] += 1
    now[0] += 10_000
    images.note_used("first", "id-first")
    images.note_used("never-pulled", "id-x")
    images.forget("third")

    heir = PulledImages(tmp_path / "images.json")

    assert [image.reference for image in heir.longest_unused_first()] == ["second:latest", "first:latest"]


@pytest.mark.parametrize("used", ["docker.io/library/app", "app:latest", "another/name:1"])
def test_a_use_counts_under_every_name_of_the_image(tmp_path, used) -> None:
    now = [1000.0]
    images = PulledImages(tmp_path / "images.json", clock=lambda: now[0])
    images.note_pulled("app", "id-app")
    now[0] += 10_000

    images.note_used(used, "id-app")

    assert [image.used_at for image in images.longest_unused_first()] == [now[0]]


@pytest.mark.parametrize(
    ("reference", "spellings"),
    [
        ("app", {"app", "app:latest", "docker.io/library/app", "docker.io/library/app:latest"}),
        ("docker.io/team/app:1", {"team/app:1", "docker.io/team/app:1"}),
        ("registry.example/app:1", {"registry.example/app:1"}),
    ],
)
def test_an_image_has_many_spellings(reference, spellings) -> None:
    assert spellings_of(reference) >= spellings


@pytest.mark.parametrize(
    ("reference", "registry"),
    [
        ("app:1", "docker.io"),
        ("team/app", "docker.io"),
        ("docker://team/app", "docker.io"),
        ("docker://registry.example:5000/team/app", "registry.example:5000"),
        ("localhost/app", "localhost"),
    ],
)
def test_a_reference_tells_the_registry_it_is_pulled_from(reference, registry) -> None:
    assert registry_of(reference) == registry
