import fcntl
import os
import resource
import socket
import stat
import threading
from array import array
from functools import partial
from pathlib import Path

import pytest

from runner.trash import GET_FLAGS, SET_FLAGS, Trash, remove_tree
from tests.runner.state_folder import NOBODY, a_state_folder, as_nobody, layers_of, needs_root, write_tree


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


def a_stubborn_tree(root: Path) -> None:
    """What steps leave that a plain removal stumbles over."""
    write_tree(root, {"locked/inner/f": "1", "read-only/f": "1", "d/x": "1"})
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(root / "d/s"))
    (root / "dangling").symlink_to("nowhere")
    (root / "read-only/f").chmod(0o444)
    (root / "read-only").chmod(0o555)
    (root / "locked/inner").chmod(0)
    (root / "locked").chmod(0)
    root.chmod(0)


@needs_root
def test_what_steps_leave_never_withstands(state: Path) -> None:
    trash = Trash(state)
    root = state / "a"
    write_tree(root, {"x": "1"})
    os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    a_stubborn_tree(root / "tree")
    for place in [root, *root.rglob("*")]:
        os.chown(place, 12345, 12345, follow_symlinks=False)

    trash.throw(root)
    trash.empty()

    assert list(trash.folder.iterdir()) == []


@needs_root
@pytest.mark.parametrize("stuck", ["tree/d/x", "tree/d", "tree"])
def test_files_that_were_made_immutable_are_removed_all_the_same(state: Path, stuck: str) -> None:
    trash = Trash(state)
    write_tree(state / "tree", {"d/x": "1", "e": "2"})
    make_immutable(state / stuck)
    with pytest.raises(PermissionError):
        (state / "tree/d/x").unlink() if stuck != "tree" else (state / "tree/e").unlink()

    trash.throw(state / "tree")
    trash.empty()

    assert not (state / "tree").exists()
    assert list(trash.folder.iterdir()) == []


def make_immutable(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    flags = array("l", [0])
    try:
        fcntl.ioctl(fd, GET_FLAGS, flags, True)
        flags[0] |= 0x10
        fcntl.ioctl(fd, SET_FLAGS, flags, True)
    except OSError as error:
        pytest.skip(f"this file system has no such flags: {error}")
    finally:
        os.close(fd)


@needs_root
def test_a_runner_without_root_removes_what_its_own_steps_left() -> None:
    with a_state_folder() as folder:
        state = folder / "of-nobody"
        state.mkdir()
        os.chown(state, NOBODY, NOBODY)
        for parent in [folder, *folder.parents]:
            if parent.stat().st_mode & 0o001 == 0:
                parent.chmod(parent.stat().st_mode | 0o001)

        assert as_nobody(partial(throw_and_empty, state)) == 0
        assert list((state / "trash").iterdir()) == []


def throw_and_empty(state: Path) -> None:
    trash = Trash(state)
    a_stubborn_tree(state / "a")
    trash.throw(state / "a")
    trash.empty()
    assert not (state / "a").exists()


def test_whoever_waits_for_the_trash_is_told_when_it_is_empty(state: Path) -> None:
    trash = Trash(state)
    trash.start()
    trash.throw(write_tree(state / "a", {f"d/{number}": "1" for number in range(300)}))

    assert trash.wait_until_idle(10)

    assert list(trash.folder.iterdir()) == []
    trash.close()


@needs_root
def test_what_withstands_is_said_once_and_not_tried_all_the_time(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trash = Trash(state)
    low = write_tree(state / "low", {"precious": "1"})
    view = write_tree(state / "a", {"x": "1"}) / "view"
    layers_of("overlay", state).stack(view, [low], state / "upper")
    trash.throw(state / "a")

    for _ in range(3):
        trash.empty()

    assert capsys.readouterr().out.count("could not be deleted") == 1
