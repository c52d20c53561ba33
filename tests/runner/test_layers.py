import os
import stat
import subprocess
from pathlib import Path

import pytest

from runner.errors import BadSetup, StepError
from runner.layers import CopyLayers, Layers, check_state_path, choose_layers
from runner.mounts import find_mount, mounts_below, unmount
from runner.trees import measure
from tests.runner.state_folder import MODES, layers_of, needs_root, read_tree, write_tree


@pytest.fixture(params=MODES)
def layers(request: pytest.FixtureRequest, state: Path) -> Layers:
    return layers_of(request.param, state)


def test_the_topmost_layer_wins_and_folders_are_joined(layers: Layers, state: Path) -> None:
    top = write_tree(state / "top", {"a": "top", "d/x": "top", "file": "now a file", "dir/y": "now a folder"})
    low = write_tree(
        state / "low", {"a": "low", "d/z": "low", "file/old": "hidden", "dir": "hidden", "l": "->a"}
    )

    layers.stack(state / "view", [top, low], state / "upper")

    assert read_tree(state / "view") == {
        "a": "top",
        "d/x": "top",
        "d/z": "low",
        "file": "now a file",
        "dir/y": "now a folder",
        "l": "->a",
    }


def test_what_is_written_never_reaches_the_layers_below(layers: Layers, state: Path) -> None:
    low = write_tree(state / "low", {"a": "low", "d/b": "low", "gone": "low"})

    layers.stack(state / "view", [low], state / "upper")
    (state / "view/a").write_text("changed")
    (state / "view/d").rename(state / "view/e")
    (state / "view/gone").unlink()

    assert read_tree(state / "view") == {"a": "changed", "e/b": "low"}
    assert read_tree(low) == {"a": "low", "d/b": "low", "gone": "low"}


def test_modes_times_and_links_are_those_of_the_layer(layers: Layers, state: Path) -> None:
    low = write_tree(state / "low", {"run": "x", "d/f": "y", "away": "->/etc/passwd"})
    (low / "run").chmod(0o751)
    os.utime(low / "run", ns=(1_000_000_000, 2_000_000_000))
    (low / "d").chmod(0o701)
    os.utime(low / "d", ns=(1_000_000_000, 3_000_000_000))

    layers.stack(state / "view", [low], state / "upper")

    run, folder = (state / "view/run").stat(), (state / "view/d").stat()
    assert (stat.S_IMODE(run.st_mode), run.st_mtime_ns) == (0o751, 2_000_000_000)
    assert (stat.S_IMODE(folder.st_mode), folder.st_mtime_ns) == (0o701, 3_000_000_000)
    assert os.readlink(state / "view/away") == "/etc/passwd"
    assert stat.S_IMODE((state / "view").stat().st_mode) == 0o777


def test_an_empty_stack_is_an_empty_writable_folder(layers: Layers, state: Path) -> None:
    layers.stack(state / "view", [], state / "upper")
    (state / "view/new").write_text("x")

    assert read_tree(state / "view") == {"new": "x"}


def test_stacking_twice_and_unstacking_twice_is_harmless(layers: Layers, state: Path) -> None:
    low = write_tree(state / "low", {"a": "low"})

    layers.stack(state / "view", [low], state / "upper")
    (state / "view/a").write_text("mine")
    layers.stack(state / "view", [low], state / "upper")

    assert layers.is_stacked(state / "view")
    assert (state / "view/a").read_text() == "mine"
    layers.unstack(state / "view")
    layers.unstack(state / "view")
    assert mounts_below(state) == []


def test_a_view_that_is_still_in_use_is_taken_away_all_the_same(state: Path) -> None:
    layers = layers_of("overlay", state)
    layers.stack(state / "view", [write_tree(state / "low", {"a": "low"})], state / "upper")

    with (state / "view/a").open() as held:
        layers.unstack(state / "view")

        assert held.read() == "low"
    assert find_mount(state / "view") is None


@pytest.mark.threat("D11")
def test_a_view_gives_nobody_rights_by_setuid_bits(layers: Layers, state: Path) -> None:
    low = write_tree(state / "low", {"evil": "x"})
    (low / "evil").chmod(0o4755)

    layers.stack(state / "view", [low], state / "upper")

    mount = subprocess.run(
        ["findmnt", "-no", "OPTIONS", state / "view"], capture_output=True, text=True
    ).stdout
    assert "nosuid" in mount or not (state / "view/evil").stat().st_mode & stat.S_ISUID


def test_too_many_layers_are_refused_and_not_cut_in_silence(state: Path) -> None:
    layers = layers_of("overlay", state)
    lowers = [write_tree(state / f"{number}-{'x' * 100}", {str(number): "x"}) for number in range(35)]

    assert layers.fits(state / "view", lowers[:20], state / "upper")
    assert not layers.fits(state / "view", lowers, state / "upper")
    with pytest.raises(StepError, match="too many"):
        layers.stack(state / "view", lowers, state / "upper")


def test_forty_layers_are_all_seen(state: Path) -> None:
    layers = layers_of("overlay", state)
    lowers = [write_tree(state / str(number), {str(number): "x"}) for number in range(40)]

    layers.stack(state / "view", lowers, state / "upper")

    assert len(read_tree(state / "view")) == 40


def test_merged_layers_show_what_their_stack_shows(layers: Layers, state: Path) -> None:
    base = write_tree(
        state / "base",
        {
            "keep": "base",
            "gone": "base",
            "d/gone": "base",
            "d/keep": "base",
            "whole/a": "base",
            "was-dir/x": "base",
        },
    )
    generations = [base]
    for number, change in enumerate((_change_files, _replace_folders, _bring_back)):
        work = state / f"view{number}"
        upper = state / f"upper{number}"
        layers.stack(work, generations, upper)
        change(work)
        layers.unstack(work)
        generations = [upper, *generations] if layers.mode == "overlay" else [work]

    layers.stack(state / "seen", generations, state / "last")
    size = layers.merge(generations, state / "merged")

    assert read_tree(state / "merged") == read_tree(state / "seen")
    assert size.entries == measure(state / "seen").entries
    assert (state / "merged/keep").stat().st_ino == (
        generations[-1] / "keep"
    ).stat().st_ino  # no data was copied


def test_layers_with_a_renamed_folder_are_merged_by_the_kernels_view(state: Path) -> None:
    layers = layers_of("overlay", state)
    base = write_tree(state / "base", {"d/deep/x": "base", "d/y": "base"})
    layers.stack(state / "view", [base], state / "upper")
    (state / "view/new").mkdir()
    (state / "view/d/deep").rename(state / "view/new/moved")
    (state / "view/new/moved/z").write_text("added")
    layers.unstack(state / "view")

    layers.merge([state / "upper", base], state / "merged")

    assert read_tree(state / "merged") == {"d/y": "base", "new/moved/x": "base", "new/moved/z": "added"}
    assert mounts_below(state) == []


def test_a_hole_of_a_terabyte_stays_a_hole_in_a_copy(state: Path) -> None:
    low = write_tree(state / "low", {})
    with (low / "sparse").open("wb") as file:
        file.write(b"start")
        file.truncate(2**40)

    CopyLayers().stack(state / "view", [low], state / "upper")

    found = (state / "view/sparse").stat()
    assert found.st_size == 2**40
    assert found.st_blocks * 512 < 1_000_000


@needs_root
def test_a_machine_that_can_mount_gets_overlays_and_leaves_nothing_of_the_trial(state: Path) -> None:
    layers, sentence = choose_layers(state / "new")

    assert layers.mode == "overlay"
    assert "overlays" in sentence
    assert [path.name for path in (state / "new").iterdir()] == ["empty"]


@needs_root
def test_a_state_folder_that_itself_lies_on_an_overlay_gets_copies(state: Path) -> None:
    layers_of("overlay", state).stack(state / "nested", [write_tree(state / "low", {})], state / "upper")

    layers, sentence = choose_layers(state / "nested")

    assert layers.mode == "copy"
    assert "copied" in sentence
    unmount(state / "nested")


@pytest.mark.parametrize("name", ["a,b", "a:b", "a\\b"])
def test_a_state_folder_that_would_be_read_as_options_is_refused(state: Path, name: str) -> None:
    with pytest.raises(BadSetup, match="comma"):
        choose_layers(state / name)


def test_a_relative_state_folder_is_refused() -> None:
    with pytest.raises(BadSetup, match="absolute"):
        check_state_path(Path("state"))


def _change_files(root: Path) -> None:
    (root / "gone").unlink()
    (root / "d/gone").unlink()
    (root / "d/new").write_text("1")


def _replace_folders(root: Path) -> None:
    (root / "whole/a").unlink()
    (root / "whole").rmdir()
    (root / "whole").mkdir()
    (root / "whole/b").write_text("2")
    (root / "was-dir/x").unlink()
    (root / "was-dir").rmdir()
    (root / "was-dir").write_text("2")


def _bring_back(root: Path) -> None:
    (root / "gone").write_text("3")
    (root / "was-dir").unlink()
