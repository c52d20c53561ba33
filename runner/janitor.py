"""Keeps the machine clean: what attempts left behind, old layers and caches, room on disks that fill."""

import threading
import time
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog

from runner.errors import EngineUnavailable, RunnerError
from runner.executor.base import Leftover
from runner.journal import Journal, open_journals
from runner.means import Means
from runner.mounts import overlays_of, unmount
from runner.room import DEFAULT_MARKS, Area, Marks, Room
from runner.spares import Spare

log = structlog.get_logger()

EVERY_S = 300.0
SOON_S = 5.0
LOOK_S = 10.0
WAY_LONGEST_S = 120.0  # twice the time that an engine has for one removal
UNFINISHED = ("probe-*", "inputs/.part-*", "checkouts/.part-*")
MOUNTED_IN_PASSING = ("cache", "trash")

Key = tuple[str, int]  # a step and the number of an attempt


class Janitor:
    """Looks around at the start and every few minutes, in a thread of its own."""

    def __init__(self, means: Means, state: Path, *, source_bytes: int, marks: Marks = DEFAULT_MARKS) -> None:
        self._means = means
        self._state = state
        self._source_bytes = source_bytes
        self._marks = marks
        self._room = Room([], marks, means.trash)
        self._lacks_storage = False
        self._held: Callable[[], Set[Key]] = frozenset
        self._stuck: set[Key] = set()
        self._in_the_way: set[Key] | None = None  # what the last round found; None: nobody has looked yet
        self._removing: Key | None = None
        self._changed = threading.Condition()
        self._soon = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="janitor", daemon=True)

    def start(self, held: Callable[[], Set[Key]]) -> None:
        """`held` names the attempts not to be touched; each is in it before its folder is made.

        The first round comes at once, and only after the coordinator has said what goes on.
        """
        self._held = held
        self._room = self._survey()
        self._thread.start()

    def clean_up_soon(self) -> None:
        """Do not wait for the next round: something was left behind."""
        self._soon.set()

    def stop(self) -> None:
        self._stopping.set()
        self._soon.set()
        self._thread.join(10)

    def sweep_folder(self) -> None:
        """Before anything is under way: what is half made in the state folder, and forgotten views.

        Nothing outside the folder is touched but git that is at home in it. It may be a copy, and then all
        else that runs is another process's until the coordinator has said whose it is; what attempts left
        goes with the first round.
        """
        _try(self._means.sources.end_former_git)
        _try(self._means.sources.take_back_logins)
        _try(self._unmount_forgotten)
        _try(self._throw_unfinished)

    def make_way(self, key: Key) -> None:
        """Before a held, fresh claim is begun: what a former life left under its name goes first.

        Raises what the engine says when it withstands.
        """
        with self._changed:
            if self._in_the_way is not None and key not in self._in_the_way:
                return
            self._changed.wait_for(lambda: self._removing != key, WAY_LONGEST_S)
        for leftover in self._means.executor.leftovers():
            if (leftover.step_id, leftover.attempt) == key:
                self._remove(leftover)
        for folder in self._attempt_folders():
            if _key_of(folder) == key:
                self._close(folder)

    def _unmount_forgotten(self) -> None:
        """Other folders below ours may be another runner's, or the operator's."""
        for mounted in overlays_of(self._state):
            place = mounted.relative_to(self._state.resolve()).parts[0]
            if place in MOUNTED_IN_PASSING or place.startswith("probe-"):
                self._unmount(mounted)

    def _throw_unfinished(self) -> None:
        for pattern in UNFINISHED:
            for folder in self._state.glob(pattern):
                self._means.trash.throw(folder)

    def _survey(self) -> Room:
        """The disks to watch: that of the state folder, and that of the engine's images."""
        areas = [Area(self._state, [self._means.caches.spares, self._spare_sources, self._spare_outputs])]
        try:
            storage, self._lacks_storage = self._means.executor.storage(), False
        except EngineUnavailable as error:
            log.warning("images_not_watched", cause=str(error))
            storage, self._lacks_storage = None, True
        if storage is not None:
            areas.append(Area(storage, [self._spare_images]))
        return Room(areas, self._marks, self._means.trash)

    def _remove(self, leftover: Leftover) -> None:
        log.info("leftover_removed", name=leftover.name, was_running=leftover.is_running)
        self._means.executor.remove_leftover(leftover)

    def _attempt_folders(self) -> list[Path]:
        return [folder for folder in (self._state / "a").glob("*/*") if folder.name.isdecimal()]

    def _close(self, folder: Path) -> None:
        workspace = self._means.workspaces.find(folder)
        if workspace is not None:
            self._means.workspaces.close(workspace)
        for index in range(32):
            cache = self._means.caches.find(folder, index)
            if cache is not None:
                self._means.caches.discard(cache)
        self._means.trash.throw(folder)
        with suppress(OSError):
            folder.parent.rmdir()  # another attempt of the step may still stand there

    def _unmount(self, mounted: Path) -> None:
        log.info("unmounted", path=str(mounted))
        _try(partial(unmount, mounted))

    def _run(self) -> None:
        """After a call, and as long as something withstands, the rounds come quicker."""
        pause = EVERY_S if self._clear_up() else SOON_S / 2
        while True:
            if self._is_called_within(pause):
                self._soon.clear()
                pause = SOON_S / 2
            if self._stopping.is_set():
                return
            is_clean = self._go_round()
            pause = EVERY_S if is_clean else min(EVERY_S, pause * 2)

    def _is_called_within(self, pause_s: float) -> bool:
        """Somebody calls, or a disk does: looking at one costs next to nothing."""
        until = time.monotonic() + pause_s
        while (left_s := until - time.monotonic()) > 0:
            if self._soon.wait(min(left_s, LOOK_S)) or self._room.is_needed():
                return True
        return False

    def _go_round(self) -> bool:
        """True when nothing is left that should have gone."""
        is_clean = self._clear_up()
        try:
            if self._room.is_blind or self._lacks_storage:
                self._room = self._survey()
            is_clean = _try(self._prune) and is_clean
            return self._room.clear() and is_clean
        except Exception:  # without this thread nothing here would ever be removed again
            log.exception("round_failed")
            return False

    def _clear_up(self) -> bool:
        """True when nothing is left of attempts that nobody holds."""
        try:
            return _try(self._remove_what_nobody_holds) and not self._stuck
        except Exception:
            log.exception("clearing_up_failed")
            return False

    def _remove_what_nobody_holds(self) -> None:
        """What attempts left whose own cleaning up has failed: the container first, then the folder."""
        folders = self._attempt_folders()
        leftovers = self._means.executor.leftovers()
        held = self._held()  # asked last: whatever was found before and is needed is in it
        self._stuck = set()
        with self._changed:
            self._in_the_way = {(one.step_id, one.attempt) for one in leftovers}
            self._in_the_way |= {_key_of(folder) for folder in folders}
        for leftover in leftovers:
            key = (leftover.step_id, leftover.attempt)
            if key not in held and not self._take_away(key, partial(self._remove, leftover)):
                self._stuck.add(key)
        for folder in folders:
            key = _key_of(folder)
            if key in held or key in self._stuck:
                continue
            log.info("attempt_removed", step=key[0], attempt=key[1])
            if not self._take_away(key, partial(self._close, folder)):
                self._stuck.add(key)
        _try(partial(self._means.executor.remove_strays, held))
        for mounted in overlays_of(self._state):
            if mounted.is_relative_to(self._means.trash.folder.resolve()):
                self._unmount(mounted)

    def _take_away(self, key: Key, act: Callable[[], None]) -> bool:
        """Unless a claim of that name came meanwhile; one that comes now waits in `make_way`."""
        with self._changed:
            if key in self._held():
                return True
            self._removing = key
        try:
            return _try(act)
        finally:
            with self._changed:
                self._removing = None
                self._changed.notify_all()

    def _prune(self) -> None:
        pinned = self._pinned()
        self._means.caches.evict()
        self._means.sources.prune(pinned, self._source_bytes)
        self._means.workspaces.prune(pinned)
        self._means.blobs.evict(self._outputs_to_keep())

    def _spare_sources(self) -> Iterator[Spare]:
        return self._means.sources.spares(self._pinned())

    def _spare_outputs(self) -> Iterator[Spare]:
        return self._means.blobs.spares(self._outputs_to_keep())

    def _spare_images(self) -> Iterator[Spare]:
        """None while the engine is away: other things can still go."""
        wanted = {str(journal.claim.get("image", "")) for journal in open_journals(self._state)}
        try:
            yield from self._means.executor.spares(wanted)
        except EngineUnavailable as error:
            log.warning("no_image_removed", cause=str(error))

    def _pinned(self) -> set[str]:
        return self._means.workspaces.pinned(self._attempt_folders())

    def _outputs_to_keep(self) -> set[str]:
        """Outputs stay until they are uploaded, however long that takes; the store spares what is younger."""
        return {sha256 for journal in open_journals(self._state) for sha256 in _outputs_of(journal)}


def _try(act: Callable[[], None]) -> bool:
    try:
        act()
    except (RunnerError, OSError) as error:
        log.warning("cleaning_up_failed", cause=str(error))
        return False
    return True


def _key_of(folder: Path) -> Key:
    return folder.parent.name, int(folder.name)


def _outputs_of(journal: Journal) -> set[str]:
    """The digests of all files that this attempt delivers, as far as it knows them."""
    completion = journal.data.get("completion") or {}
    named = [entry.get("sha256") for entry in completion.get("artifacts") or ()]
    return {sha256 for sha256 in [*named, *(journal.data.get("collected") or ())] if sha256}
