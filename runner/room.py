"""Makes room on disks that fill: above a high mark the longest unused goes until a low mark is reached.

The stores offer what can be made again, each in the order in which it wants to give; of all that is offered
the longest unused goes first. What running steps stand on is never offered.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from runner.spares import Spare
from runner.trash import Trash

log = structlog.get_logger()

MOST_AT_ONCE: Final = 1000
LONGEST_S: Final = 60.0
TRASH_PATIENCE_S: Final = 60.0

Offer = Callable[[], Iterable[Spare]]


@dataclass(frozen=True)
class Marks:
    """Shares of a disk in percent; `high` 100 means that nothing is removed for its sake."""

    high: int = 85
    low: int = 75
    reserve_bytes: int = 0

    def excess(self, space: "Space", *, is_clearing: bool) -> int:
        """How many bytes have to go: none below the high mark, unless the low one is not reached yet."""
        lacking = max(0, self.reserve_bytes - space.free)
        above = space.used * 100 > space.total * self.high
        between = is_clearing and space.used * 100 > space.total * self.low
        if self.high >= 100 or not (above or between):
            return lacking
        return max(lacking, space.used - space.total * min(self.low, self.high) // 100)


DEFAULT_MARKS: Final = Marks()


@dataclass(frozen=True)
class Space:
    """One file system as a user of it sees it, in bytes."""

    device: int
    used: int
    free: int

    @property
    def total(self) -> int:
        return self.used + self.free


@dataclass(frozen=True)
class Area:
    """A folder and what can go from its file system."""

    folder: Path
    offers: Sequence[Offer]


def look_at(folder: Path) -> Space:
    found = os.statvfs(folder)
    return Space(
        device=folder.stat().st_dev,
        used=(found.f_blocks - found.f_bfree) * found.f_frsize,
        free=found.f_bavail * found.f_frsize,
    )


class Room:
    """Watches some folders; one thread at a time may clear."""

    def __init__(
        self,
        areas: Sequence[Area],
        marks: Marks,
        trash: Trash,
        *,
        look: Callable[[Path], Space] = look_at,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._areas = areas
        self._marks = marks
        self._trash = trash
        self._look = look
        self._clock = clock
        self._clearing: set[int] = set()  # devices between the marks, on their way down
        self._helpless: set[int] = set()
        self.is_blind = False  # some folder could not be looked at the last time

    def is_needed(self) -> bool:
        """True when some disk is above its mark and something could still be found to go."""
        return any(
            self._excess(space) > 0 and space.device not in self._helpless for space, _ in self._by_disk()
        )

    def clear(self) -> bool:
        """Remove what has to go, a bounded part at a time; True when all is done that can be done."""
        if not any(self._excess(space) for space, _ in self._by_disk()):
            self._clearing.clear()
            self._helpless.clear()
            return True
        if not self._trash.wait_until_idle(TRASH_PATIENCE_S):
            return False  # what was thrown away before still counts as used: do not take more for it
        is_done = True
        for space, offers in self._by_disk():
            excess = self._excess(space)
            if excess > 0:
                self._clearing.add(space.device)
                is_done = self._clear_disk(space, excess, offers) and is_done
            else:
                self._clearing.discard(space.device)
                self._helpless.discard(space.device)
        return is_done

    def _clear_disk(self, space: Space, excess: int, offers: Sequence[Offer]) -> bool:
        """False when there may be more to remove in another round."""
        freed, removed = 0, 0
        until = time.monotonic() + LONGEST_S
        for spare in longest_unused_first(offers):
            if freed >= excess or removed >= MOST_AT_ONCE or time.monotonic() > until:
                return False  # another look at the disk tells what has become of it
            if not spare.remove():
                continue
            freed += spare.bytes
            removed += 1
            log.info(
                "removed_for_room",
                kind=spare.kind,
                name=spare.name,
                bytes=spare.bytes,
                unused_s=max(0, round(self._clock() - spare.used_at)),
            )
        if removed:
            return False
        if space.device not in self._helpless:
            self._helpless.add(space.device)
            log.warning("no_room_can_be_made", wanted_bytes=excess, free_bytes=space.free)
        return True

    def _excess(self, space: Space) -> int:
        return self._marks.excess(space, is_clearing=space.device in self._clearing)

    def _by_disk(self) -> list[tuple[Space, list[Offer]]]:
        """Each file system once, with all that lies on it."""
        disks: dict[int, tuple[Space, list[Offer]]] = {}
        was_blind, self.is_blind = self.is_blind, False
        for area in self._areas:
            try:
                space = self._look(area.folder)
            except OSError as error:  # an engine that was moved takes its folder along
                self.is_blind = True
                if not was_blind:
                    log.warning("disk_not_watched", folder=str(area.folder), cause=str(error))
                continue
            disks.setdefault(space.device, (space, []))[1].extend(area.offers)
        return list(disks.values())


def longest_unused_first(offers: Sequence[Offer]) -> Iterator[Spare]:
    """One after the other, from whichever store has the longest unused at the head of its own order."""
    heads: list[tuple[Spare, Iterator[Spare]]] = []
    for offer in offers:
        rest = iter(offer())
        first = next(rest, None)
        if first is not None:
            heads.append((first, rest))
    while heads:
        index = min(range(len(heads)), key=lambda at: heads[at][0].used_at)
        spare, rest = heads[index]
        yield spare
        following = next(rest, None)
        if following is None:
            del heads[index]
        else:
            heads[index] = (following, rest)
