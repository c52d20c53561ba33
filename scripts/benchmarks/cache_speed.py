"""What a large cache costs between builds: restoring and publishing it, changed or not, young or old.

A figure is the time that opening the cache and publishing it take together; what the step itself writes in
between is not counted. The rival copies the same files with `cp -a`, which is what a cache by copying does
once for restoring and once more for saving.
"""

import os
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from runner.cache import CacheStore, OpenCache
from runner.layers import choose_layers
from runner.trash import Trash
from scripts.benchmarks.figure import Figure, Goal, in_turns, say
from scripts.benchmarks.servers import temporary_folder
from shared.protocol import Mount

FILES_OF_A_FOLDER = 200
UNCHANGED = Goal(1.0, "<= 1 s")
CHANGED = Goal(1.5, "<= 1.5 s")
AGED = Goal(2.0, "<= 2 times the first")
COPY_S = 300


@dataclass(frozen=True)
class Size:
    files: int = 40_000
    changed: int = 200
    generations: int = 30
    rounds: int = 3


QUICK = Size(generations=18, rounds=2)
SMALLEST = Size(files=400, changed=5, generations=3, rounds=1)


def measure(size: Size) -> list[Figure]:
    with temporary_folder() as folder:
        cache = BenchCache(folder, size)
        say(f"cache: writing {size.files} files ({cache.mode} mode)")
        cache.fill()
        kept = folder / "kept"
        unchanged_s, copy_s = in_turns(
            "cache, seconds", size.rounds, cache.pass_unchanged, lambda: _seconds_of_copy(cache.sample, kept)
        )
        first_s = statistics.median(cache.pass_changed() for _ in range(size.rounds))
        say(f"cache: {size.changed} files changed: {first_s:.3f} s")
        for number in range(size.rounds, size.generations):
            seconds = cache.pass_changed()
            if number % 10 == 9:
                say(f"cache: generation {number + 1}: {seconds:.3f} s")
        last_s = statistics.median(cache.pass_changed() for _ in range(size.rounds))
        cache.require_whole()
        cache.close()
    copied = f"cp -a {copy_s:.2f} s"
    what = f"a cache of {size.files:,} files ({cache.mode})"
    return [
        Figure(
            f"{what}, unchanged",
            f"{unchanged_s * 1000:.0f} ms",
            f"{copied} ({unchanged_s / copy_s:.3f})",
            UNCHANGED.text,
            UNCHANGED.is_met_by(unchanged_s),
        ),
        Figure(
            f"{what}, {size.changed} changed",
            f"{first_s * 1000:.0f} ms",
            f"{copied} ({first_s / copy_s:.3f})",
            CHANGED.text,
            CHANGED.is_met_by(first_s),
        ),
        Figure(
            f"{what}, {size.changed} changed, after {size.generations} generations",
            f"{last_s * 1000:.0f} ms",
            f"the first took {first_s * 1000:.0f} ms ({last_s / first_s:.2f})",
            AGED.text,
            AGED.is_met_by(last_s / first_s),
        ),
    ]


class BenchCache:
    """One cache directory in the hands of one step after the other."""

    def __init__(self, folder: Path, size: Size) -> None:
        state = folder / "state"
        layers, _ = choose_layers(state)
        self.mode = layers.mode
        self.sample = folder / "sample"
        self._trash = Trash(state)
        self._trash.start()
        self._store = CacheStore(state, layers, self._trash)
        self._attempts = folder / "attempts"
        self._size = size
        self._passes = 0

    def fill(self) -> None:
        """The first generation; what it holds is also kept aside, for the rival to copy."""
        for number in range(self._size.files):
            place = self.sample / _name(number)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(b"%d\n" % number * 50)
        cache, _ = self._open()
        shutil.copytree(self.sample, cache.path, dirs_exist_ok=True)
        self._publish(cache, is_changed=True)
        os.sync()

    def pass_unchanged(self) -> float:
        cache, opening_s = self._open()
        return opening_s + self._publish(cache, is_changed=False)

    def pass_changed(self) -> float:
        cache, opening_s = self._open()
        for number in range(self._size.changed):
            place = cache.path / _name((number * 7919 + self._passes) % self._size.files)
            place.write_bytes(b"changed %d\n" % self._passes * 50)
        return opening_s + self._publish(cache, is_changed=True)

    def require_whole(self) -> None:
        """What comes back after all the generations is as many files as went in."""
        cache, _ = self._open()
        count = sum(len(files) for _, _, files in os.walk(cache.path))
        self._store.discard(cache)
        if count != self._size.files:
            raise RuntimeError(f"the cache came back with {count} files of {self._size.files}")

    def close(self) -> None:
        self._store.close()
        self._trash.close()

    def _open(self) -> tuple[OpenCache, float]:
        self._passes += 1
        attempt = self._attempts / str(self._passes)
        attempt.mkdir(parents=True)
        began = time.perf_counter()
        cache = self._store.open(attempt, 0, Mount(path="cache", key="bench", trust="default"))
        return cache, time.perf_counter() - began

    def _publish(self, cache: OpenCache, *, is_changed: bool) -> float:
        began = time.perf_counter()
        if self._store.publish(cache) is not is_changed:
            raise RuntimeError("the cache was not published as expected")
        return time.perf_counter() - began


def _name(number: int) -> str:
    return f"d{number // FILES_OF_A_FOLDER}/f{number}"


def _seconds_of_copy(sample: Path, kept: Path) -> float:
    shutil.rmtree(kept, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(["cp", "-a", sample, kept], check=True, timeout=COPY_S)
    return time.perf_counter() - began
