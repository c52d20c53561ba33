"""Names of images are compared as the engine lists them."""

import pytest

from runner.executor.housekeeping import repository_of, with_tag
from runner.executor.images import PulledImages


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
    images.note_used("first")
    images.note_used("never-pulled")
    images.forget("third")

    heir = PulledImages(tmp_path / "images.json")

    assert [image.reference for image in heir.longest_unused_first()] == ["second", "first"]
