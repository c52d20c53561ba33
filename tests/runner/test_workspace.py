import hashlib
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.errors import StepError
from runner.mounts import mounts_below
from runner.trash import Trash
from runner.workspace import Workspaces
from shared.protocol import InputFile
from shared.reasons import Reason
from tests.runner.state_folder import MODES, a_state_folder, layers_of, read_tree, write_tree


class Bench:
    """A runner's state folder with a blob store and one attempt after the other."""

    def __init__(self, state: Path, mode: str) -> None:
        self.state = state
        self.blobs = state / "blobs"
        self.blobs.mkdir()
        self.trash = Trash(state)
        self.now = 1_000_000_000.0
        self.workspaces = Workspaces(state, layers_of(mode, state), self.trash, clock=lambda: self.now)
        self.notes: list[str] = []
        self.fetched: list[str] = []
        self.attempts = 0

    def attempt(self) -> Path:
        self.attempts += 1
        folder = self.state / "a" / str(self.attempts)
        folder.mkdir(parents=True)
        return folder

    def file(self, step: str, path: str, text: str, *, mode: int = 0o644) -> InputFile:
        name = hashlib.sha256(text.encode()).hexdigest()
        (self.blobs / name).write_text(text)
        return InputFile(step=step, path=path, type="file", mode=mode, size=len(text), sha256=name)

    def fetch(self, name: str) -> Path:
        self.fetched.append(name)
        return self.blobs / name

    def build(self, inputs: list[InputFile], checkout: Path | None = None, attempt: Path | None = None):  # type: ignore[no-untyped-def]
        return self.workspaces.build(
            attempt or self.attempt(),
            checkout=checkout,
            inputs=inputs,
            fetch=self.fetch,
            note=self.notes.append,
        )


@pytest.fixture(params=MODES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with a_state_folder() as state:
        yield Bench(state, request.param)


def test_scratch_lies_over_outputs_over_the_checkout(bench: Bench) -> None:
    checkout = write_tree(bench.state / "checkout", {"src/main": "code", "out/old": "code", "both": "code"})

    workspace = bench.build([bench.file("a", "out/new", "built"), bench.file("a", "both", "built")], checkout)
    (workspace.path / "src/main").write_text("scratch")

    assert read_tree(workspace.path) == {
        "src/main": "scratch",
        "out/old": "code",
        "out/new": "built",
        "both": "built",
    }
    assert read_tree(checkout)["src/main"] == "code"
    assert bench.notes == []


def test_what_a_step_writes_reaches_neither_another_step_nor_the_store(bench: Bench) -> None:
    inputs = [bench.file("a", "x", "built"), bench.file("a", "run", "#!", mode=0o755)]
    checkout = write_tree(bench.state / "checkout", {"c": "code"})
    first = bench.build(inputs, checkout)

    for name in ("x", "run", "c"):
        (first.path / name).write_text("changed")
        (first.path / name).chmod(0o600)
    second = bench.build(inputs, checkout)

    assert read_tree(second.path) == {"x": "built", "run": "#!", "c": "code"}
    assert stat.S_IMODE((second.path / "run").stat().st_mode) == 0o755
    assert {path.read_text() for path in bench.blobs.iterdir()} == {"built", "#!"}


def test_an_empty_workspace_is_writable(bench: Bench) -> None:
    workspace = bench.build([])

    (workspace.path / "new").write_text("x")

    assert read_tree(workspace.path) == {"new": "x"}


def test_one_set_of_outputs_is_laid_out_once_for_all_steps(bench: Bench) -> None:
    inputs = [bench.file("a", "d/x", "1"), bench.file("b", "d/y", "2")]
    bench.build(inputs)
    count = len(bench.fetched)

    workspace = bench.build(inputs)

    assert read_tree(workspace.path) == {"d/x": "1", "d/y": "2"}
    assert len(bench.fetched) == count == 2


def test_steps_that_need_the_same_outputs_at_once_do_not_disturb_each_other(bench: Bench) -> None:
    inputs = [bench.file("a", f"d{number % 7}/f{number}", str(number)) for number in range(200)]
    attempts = [bench.attempt() for _ in range(4)]
    barrier = threading.Barrier(4)
    seen: list[int] = []

    def work(attempt: Path) -> None:
        barrier.wait()
        seen.append(len(read_tree(bench.build(inputs, attempt=attempt).path)))

    threads = [threading.Thread(target=work, args=(attempt,)) for attempt in attempts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert seen == [200] * 4
    assert len(list((bench.state / "inputs").iterdir())) == 1


def test_the_later_step_wins_and_every_overwrite_is_said_in_one_line(bench: Bench) -> None:
    workspace = bench.build(
        [
            bench.file("a", "x", "first of a"),
            bench.file("a", "x", "of a"),
            bench.file("a", "same", "equal"),
            bench.file("b", "x", "of b"),
            InputFile(step="b", path="l", type="link", target="x"),
            InputFile(step="c", path="l", type="link", target="y"),
        ]
    )

    assert read_tree(workspace.path) == {"x": "of b", "same": "equal", "l": "->y"}
    assert bench.notes == [
        "x of step b overwrites that of step a",
        "l of step c overwrites that of step b",
    ]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    "pair",
    [
        (("file", "out"), ("file", "out/x")),
        (("file", "out"), ("directory", "out")),
        (("link", "out"), ("file", "out/x/y")),
        (("link", "a/out"), ("directory", "a/out")),
        (("file", "a/b"), ("directory", "a/b/c")),
    ],
)
def test_a_file_against_a_directory_is_a_conflict(
    bench: Bench, pair: tuple[tuple[str, str], ...], order: int
) -> None:
    made = {
        "file": lambda step, path: bench.file(step, path, "x"),
        "link": lambda step, path: InputFile(step=step, path=path, type="link", target="/etc"),
        "directory": lambda step, path: InputFile(step=step, path=path, type="directory"),
    }
    inputs = [made[kind](step, path) for step, (kind, path) in zip("ab", pair, strict=True)][::order]

    with pytest.raises(StepError) as caught:
        bench.build(inputs)

    assert caught.value.reason == Reason.OUTPUT_CONFLICT


def test_an_output_replaces_a_link_of_the_checkout_and_is_not_written_through_it(bench: Bench) -> None:
    outside = write_tree(bench.state / "outside", {"x": "precious"})
    checkout = write_tree(bench.state / "checkout", {"out": f"->{outside}"})

    workspace = bench.build([bench.file("a", "out/x", "built")], checkout)

    assert read_tree(workspace.path) == {"out/x": "built"}
    assert read_tree(outside) == {"x": "precious"}


@pytest.mark.threat("D13")
@pytest.mark.parametrize(
    "path",
    ["../x", "/etc/x", "a/../x", "a//b", "./a", "a/", "", ".", "..", "a\0b", "x" * 256, "d/" * 2_100 + "x"],
)
def test_an_output_whose_path_leaves_the_workspace_is_refused(bench: Bench, path: str) -> None:
    entry = bench.file("a", "x", "1").model_copy(update={"path": path})

    with pytest.raises(StepError) as caught:
        bench.build([entry])

    assert caught.value.reason == Reason.BAD_CONFIG


def test_modes_are_those_that_were_recorded_and_carry_no_rights(bench: Bench) -> None:
    workspace = bench.build(
        [
            bench.file("a", "run", "x", mode=0o750),
            bench.file("a", "evil", "y", mode=0o4755),
            bench.file("a", "d/plain", "x", mode=0o644),
            InputFile(step="a", path="empty", type="directory", mode=0o755),
        ]
    )

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in workspace.path.rglob("*")}
    assert modes == {"run": 0o750, "evil": 0o755, "d": 0o777, "plain": 0o644, "empty": 0o777}


def test_content_of_another_length_than_recorded_is_refused(bench: Bench) -> None:
    entry = bench.file("a", "x", "1").model_copy(update={"size": 2})

    with pytest.raises(StepError) as caught:
        bench.build([entry])

    assert caught.value.reason == Reason.INTERNAL
    assert list((bench.state / "inputs").iterdir()) == []


@pytest.mark.threat("D12")
def test_closing_removes_whatever_a_step_left(bench: Bench) -> None:
    precious = write_tree(bench.state / "precious", {"x": "1"})
    checkout = write_tree(bench.state / "checkout", {"c": "code"})
    workspace = bench.build([bench.file("a", "x", "1")], checkout)
    write_tree(workspace.path, {"locked/f": "1", "away": f"->{precious}"})
    (workspace.path / "locked").chmod(0)

    bench.workspaces.close(workspace)
    bench.workspaces.close(workspace)
    bench.trash.empty()

    assert list(workspace.attempt_dir.iterdir()) == []
    assert list(bench.trash.folder.iterdir()) == []
    assert mounts_below(bench.state) == []
    assert read_tree(precious) == {"x": "1"}
    assert read_tree(checkout) == {"c": "code"}


def test_a_restarted_runner_finds_the_workspace_as_it_was(bench: Bench) -> None:
    inputs = [bench.file("a", "x", "1")]
    workspace = bench.build(inputs)
    (workspace.path / "x").write_text("changed")

    again = bench.build(inputs, attempt=workspace.attempt_dir)

    assert again == workspace == bench.workspaces.find(workspace.attempt_dir)
    assert read_tree(again.path) == {"x": "changed"}


def test_layers_in_use_survive_pruning(bench: Bench) -> None:
    checkout = write_tree(bench.state / "checkout", {"c": "code"})
    kept = bench.build([bench.file("a", "x", "1")], checkout)
    dropped = bench.build([bench.file("a", "x", "2")], checkout)
    bench.workspaces.close(dropped)
    pins = bench.workspaces.pinned([kept.attempt_dir, dropped.attempt_dir])
    bench.now = 4_000_000_000.0

    bench.workspaces.prune(pins)

    assert "checkout" in pins
    assert {path.name for path in (bench.state / "inputs").iterdir()} == pins - {"checkout"}


def test_nobody_else_on_this_machine_can_enter_a_workspace(bench: Bench) -> None:
    workspace = bench.build([])

    assert stat.S_IMODE(workspace.attempt_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(workspace.path.stat().st_mode) == 0o777
