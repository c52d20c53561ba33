import os
from pathlib import Path

from runner.disk import MIB, DiskGuard, DiskWatch, bytes_taken, free_bytes
from tests.runner.state_folder import layers_of, needs_root

PLENTY = 2**60


def fill(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)


def test_what_a_folder_takes_counts_without_what_its_links_lead_to(state: Path) -> None:
    fill(state / "outside" / "big", 4 * MIB)
    fill(state / "step" / "deep" / "er" / "file", MIB)
    (state / "step" / "link").symlink_to(state / "outside")
    (state / "step" / "hole").touch()
    os.truncate(state / "step" / "hole", 100 * MIB)

    assert MIB <= bytes_taken(state / "step") < 2 * MIB


def test_a_folder_that_has_gone_takes_nothing(state: Path) -> None:
    assert bytes_taken(state / "nothing") == 0


def test_counting_ends_in_a_folder_with_too_many_files(state: Path) -> None:
    for number in range(10):
        fill(state / "step" / str(number), 4096)

    assert bytes_taken(state / "step", most_entries=3) == 3 * 4096


@needs_root
def test_a_workspace_counts_by_what_was_written_into_it(state: Path) -> None:
    fill(state / "checkout" / "big", 4 * MIB)
    attempt = state / "a"
    attempt.mkdir()
    layers_of("overlay", state).stack(attempt / "ws", [state / "checkout"], attempt / "upper")
    fill(attempt / "ws" / "out", MIB)

    assert MIB <= bytes_taken(attempt) < 2 * MIB


def test_a_step_beyond_its_limit_has_to_end(state: Path) -> None:
    fill(state / "step" / "big", 2 * MIB)

    assert "its limit is 1 MiB" in DiskGuard(state, step_bytes=MIB).verdict(state / "step")
    assert DiskGuard(state, step_bytes=8 * MIB).verdict(state / "step") == ""
    assert DiskGuard(state).verdict(state / "step") == ""


def test_where_the_disk_runs_short_only_a_step_that_wrote_much_has_to_end(state: Path) -> None:
    fill(state / "small" / "file", MIB)
    fill(state / "large" / "file", 65 * MIB)
    guard = DiskGuard(state, reserve_bytes=PLENTY)

    assert guard.is_short
    assert guard.verdict(state / "small") == ""
    assert "are free on the runner's disk" in guard.verdict(state / "large")
    assert not DiskGuard(state, reserve_bytes=0).is_short
    assert not DiskGuard(state, reserve_bytes=1).is_short
    assert free_bytes(state) > 0


def test_a_step_is_looked_at_now_and_then_only(state: Path) -> None:
    fill(state / "step" / "big", 2 * MIB)
    now = [100.0]
    watch = DiskWatch(DiskGuard(state, step_bytes=MIB), state / "step", clock=lambda: now[0])

    assert watch.verdict()
    now[0] += 1.9
    assert watch.verdict() == ""
    now[0] += 0.2
    assert watch.verdict()
