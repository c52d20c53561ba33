import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.trash import Trash, remove_tree
from tests.runner.state_folder import a_state_folder, layers_of, write_tree


@pytest.fixture
def state() -> Iterator[Path]:
    with a_state_folder() as folder:
        yield folder


def test_what_is_thrown_away_has_gone_at_once_and_is_deleted_later(state: Path) -> None:
    trash = Trash(state)
    write_tree(state / "a", {"d/x": "1"})

    trash.throw(state / "a")
    trash.throw(state / "never-there")

    assert not (state / "a").exists()
    assert len(list(trash.folder.iterdir())) == 1
    trash.empty()
    assert list(trash.folder.iterdir()) == []


def test_the_background_deletes_what_a_former_life_left(state: Path) -> None:
    Trash(state).throw(write_tree(state / "a", {"x": "1"}))
    trash = Trash(state)

    trash.start()
    for _ in range(500):
        if not list(trash.folder.iterdir()):
            break
        threading.Event().wait(0.01)
    trash.close()

    assert list(trash.folder.iterdir()) == []


@pytest.mark.threat("D12")
def test_closed_folders_are_removed_and_links_are_not_followed(state: Path) -> None:
    keep = write_tree(state / "keep", {"precious": "1"})
    root = write_tree(
        state / "a", {"locked/f": "1", "link": f"->{keep}", "locked/link": f"->{keep}/precious"}
    )
    (root / "locked/f").chmod(0)
    (root / "locked").chmod(0)

    remove_tree(root)

    assert not root.exists()
    assert (keep / "precious").read_text() == "1"


@pytest.mark.threat("D09")
def test_a_tree_deeper_than_any_path_can_name_is_removed(state: Path) -> None:
    top = state / "deep"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    for _ in range(2_000):
        os.mkdir("d" * 20, dir_fd=fd)
        inner = os.open("d" * 20, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))

    try:
        remove_tree(top)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert list(state.iterdir()) == []


def test_what_is_still_mounted_in_a_tree_is_left_alone(state: Path) -> None:
    low = write_tree(state / "low", {"precious": "1"})
    (state / "a").mkdir()
    layers_of("overlay", state).stack(state / "a/view", [low], state / "upper")
    (state / "a/view/mine").write_text("2")

    remove_tree(state / "a")

    assert (state / "a/view/mine").read_text() == "2"
