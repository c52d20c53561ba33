"""Whether this machine should take steps: it pauses when attempts keep failing through no fault of their own.

A machine with a broken disk or engine fails steps faster than any other takes them, so it would draw the
whole queue into its own trouble. What runs goes on; the pause outlives a restart of the runner.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Self

import structlog

from runner.deadline import Deadline
from runner.disk import DiskGuard
from runner.durable import NO_ROOM, write_whole
from shared.reasons import Reason

log = structlog.get_logger()

IN_A_ROW: Final = 3
MOST_STEPS: Final = 100
FIRST_PAUSE_S: Final = 60.0
LONGEST_PAUSE_S: Final = 900.0
MOST_BYTES: Final = 64 * 1024
# What speaks against the machine; a runner that was told to stop says nothing about it.
AGAINST_US: Final = frozenset(
    {
        Reason.DAEMON_ERROR,
        Reason.DISK_FULL,
        Reason.CONTAINER_VANISHED,
        Reason.PULL_NETWORK,
        Reason.UPLOAD_FAILED,
        Reason.INTERNAL,
    },
)


@dataclass(frozen=True)
class Condition:
    """What a heartbeat says of the machine."""

    low_disk: bool = False
    paused_for_s: int = 0
    pause_reason: str = ""


@dataclass(frozen=True)
class Tried:
    """What was tried, by which it is told apart: many attempts of one step are one sign of trouble."""

    step: str
    registry: str = ""  # where its image comes from
    has_image: bool = False  # it got as far as having its image


@dataclass(frozen=True)
class _Record:
    """What is known of the latest attempts; `pause_s` is the length of the last pause.

    A registry is the user's choice. Only when two of them cannot be reached is it the machine's network.
    """

    steps: tuple[str, ...] = ()
    unpulled: tuple[tuple[str, str], ...] = ()  # steps whose image could not be pulled, and its registry
    pause_s: float = 0.0
    why: str = ""
    until: Deadline | None = None

    @property
    def signs(self) -> set[str]:
        """The steps that speak against this machine."""
        is_network = len({registry for _, registry in self.unpulled}) > 1
        return {*self.steps, *(step for step, _ in self.unpulled if is_network)}

    def with_failure(self, reason: str, tried: Tried) -> Self:
        if reason == Reason.PULL_NETWORK:
            pair = (tried.step, tried.registry)
            others = [one for one in self.unpulled if one != pair]
            return replace(self, unpulled=(*others, pair)[-MOST_STEPS:])
        steps = (*(one for one in self.steps if one != tried.step), tried.step)[-MOST_STEPS:]
        return replace(self, steps=steps, unpulled=() if tried.has_image else self.unpulled)

    @property
    def left_s(self) -> float:
        return 0.0 if self.until is None else max(0.0, self.until.left_s())


class Health:
    """Counts how attempts end; safe to use from several threads."""

    def __init__(self, state: Path, disk: DiskGuard) -> None:
        self._path = state / "health.json"
        self._disk = disk
        self._lock = threading.Lock()
        self._said = ""
        self._record = self._load()

    def note_completion(self, completion: Mapping[str, Any] | None, tried: Tried) -> bool:
        """Learn from what was told of an attempt that has ended; True when a pause begins with it."""
        if not completion:
            return False
        reason = completion.get("reason")
        if reason in AGAINST_US:
            return self._note_failure(str(reason), tried)
        if completion.get("status") == "success" or completion.get("exitCode") is not None:
            self._note_that_it_works(None if reason is None else str(reason))
        return False

    def condition(self) -> Condition:
        record = self._record
        left_s = record.left_s
        return Condition(
            low_disk=self._disk.is_short,
            paused_for_s=0 if left_s <= 0 else max(1, round(left_s)),
            pause_reason=record.why[:200] if left_s > 0 else "",
        )

    def may_take_steps(self) -> bool:
        """False while it pauses or lacks room; what has changed is said once in the log."""
        now = self.condition()
        hindrance = "pause" if now.paused_for_s else "disk" if now.low_disk else ""
        with self._lock:
            before, self._said = self._said, hindrance
        if hindrance == before:
            return not hindrance
        if hindrance == "pause":
            log.warning("no_steps_taken", why=now.pause_reason, for_s=now.paused_for_s)
        elif hindrance == "disk":
            log.warning(
                "no_steps_taken", why="less is free on the disk than BUILDMILL_DISK_RESERVE_MB asks for"
            )
        else:
            log.info("steps_taken_again")
        return not hindrance

    def _note_failure(self, reason: str, tried: Tried) -> bool:
        with self._lock:
            before = self._record
            if before.left_s > 0:
                return False  # it was running when the pause began: the same trouble, not one more
            self._record = now = replace(before.with_failure(reason, tried), why="", until=None)
            failures = len(now.signs)
            is_pause = failures >= IN_A_ROW and now.signs != before.signs
            if is_pause:
                pause_s = min(LONGEST_PAUSE_S, before.pause_s * 2) if before.pause_s else FIRST_PAUSE_S
                why = f"{failures} steps in a row failed because of this machine, the last one: {reason}"
                self._record = replace(now, pause_s=pause_s, why=why, until=Deadline.after(pause_s))
                log.warning("pause_begun", failures=failures, reason=reason, for_s=pause_s)
            self._save()
            return is_pause

    def _note_that_it_works(self, reason: str | None) -> None:
        """A script that ran to its end, well or badly, shows that the machine is sound."""
        if reason == Reason.CANCELLED or (reason is not None and Reason(reason).is_infrastructure):
            return
        with self._lock:
            if self._record != _Record():
                self._record = _Record()
                self._save()

    def _save(self) -> None:
        """Best effort: the disk may be the very thing that fails."""
        record = self._record
        fields = {
            "steps": record.steps,
            "unpulled": record.unpulled,
            "pauseS": record.pause_s,
            "why": record.why,
            "until": None if record.until is None else record.until.record(),
        }
        try:
            write_whole(self._path, json.dumps(fields).encode())
        except OSError as error:
            is_full = error.errno in NO_ROOM
            log.warning("health_not_written", is_full=is_full, cause=str(error))

    def _load(self) -> _Record:
        """What the former life knew. After a restart of the machine a pause begins anew, at its length."""
        try:
            with self._path.open("rb") as file:
                said = json.loads(file.read(MOST_BYTES))
            pause_s = min(LONGEST_PAUSE_S, max(0.0, float(said["pauseS"])))
            until = said["until"]
            return _Record(
                steps=tuple(str(step) for step in said["steps"])[-MOST_STEPS:],
                unpulled=tuple((str(step), str(host)) for step, host in said["unpulled"])[-MOST_STEPS:],
                pause_s=pause_s,
                why=str(said["why"]),
                until=None if until is None else _not_longer(until, pause_s),
            )
        except FileNotFoundError:
            return _Record()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("health_unreadable", path=str(self._path), cause=str(error))
            return _Record()


def _not_longer(until: Mapping[str, Any], pause_s: float) -> Deadline:
    """The end that was written down, unless no pause of this length could end so late."""
    found = Deadline.recorded(dict(until), otherwise_s=pause_s)
    return found if found.left_s() <= pause_s else Deadline.after(pause_s)
