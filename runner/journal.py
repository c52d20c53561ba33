"""What an attempt has done so far, on disk before each effect that others can see.

A runner that was killed anywhere reads this and goes on. The phase only ever moves forward; an effect
that the journal does not announce has not happened.
"""

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import structlog

from runner.durable import no_room_ends_the_step, write_whole

log = structlog.get_logger()

FILE_NAME = "journal.json"
VERSION = 1
MOST_BYTES = 256 * 1024 * 1024


class JournalPhase(StrEnum):
    """How far an attempt has come, in this order."""

    CLAIMED = "claimed"
    CREATING = "creating"
    RUNNING = "running"
    EXITED = "exited"
    COLLECTING = "collecting"
    UPLOADING = "uploading"
    COMPLETING = "completing"
    CLEANING = "cleaning"  # cancelled or given up: what is left is removed, and the coordinator told so
    DONE = "done"

    @property
    def order(self) -> int:
        return list(JournalPhase).index(self)

    def is_before(self, other: "JournalPhase") -> bool:
        return self.order < other.order


class Journal:
    """The journal of one attempt. `data` holds what was recorded, as JSON gives it back."""

    def __init__(
        self,
        path: Path,
        phase: JournalPhase,
        claim: Mapping[str, Any],
        data: Mapping[str, Any],
        runner: str = "",
    ) -> None:
        self.path = path
        self.runner = runner  # who began the attempt; what it made carries this name
        self.phase = phase
        self.claim = dict(claim)
        self.data = dict(data)

    @classmethod
    def create(cls, folder: Path, claim: Mapping[str, Any], *, runner: str = "") -> Self:
        """Begin the journal of a fresh claim (without its secrets) in the attempt's folder."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        journal = cls(folder / FILE_NAME, JournalPhase.CLAIMED, claim, {}, runner)
        journal._write()
        return journal

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """The journal a former life left here, or None. One that cannot be understood is set aside."""
        path = folder / FILE_NAME
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError("the journal is far too large")
            content = json.loads(path.read_bytes())
            if content["version"] != VERSION:
                raise ValueError(f"journals of version {content['version']} are not known")
            claim, data = content["claim"], content["data"]
            if not (isinstance(claim, dict) and isinstance(data, dict)):
                raise TypeError("claim and data are objects")
            return cls(path, JournalPhase(content["phase"]), claim, data, str(content.get("runner", "")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            aside = _free_name(path)
            path.rename(aside)
            log.error("journal_unreadable", path=str(path), set_aside=str(aside), error=str(error))
            return None

    @property
    def folder(self) -> Path:
        """The attempt's folder."""
        return self.path.parent

    @property
    def step_id(self) -> str:
        return self.folder.parent.name

    @property
    def attempt(self) -> int:
        return int(self.folder.name)

    @property
    def is_done(self) -> bool:
        return self.phase is JournalPhase.DONE

    def advance(self, phase: JournalPhase, **data: Any) -> None:
        """Record that `phase` begins, together with what later lives must know.

        When the disk refuses, StepError says so; this life still knows what it was told.
        """
        if phase.is_before(self.phase):
            raise ValueError(f"the journal stands at {self.phase} and does not go back to {phase}")
        self.phase = phase
        self.data.update(data)
        self._write()

    def record(self, **data: Any) -> None:
        """Add what later lives must know, in the same phase."""
        self.advance(self.phase, **data)

    def _write(self) -> None:
        content = {
            "version": VERSION,
            "phase": self.phase,
            "runner": self.runner,
            "claim": self.claim,
            "data": self.data,
        }
        with no_room_ends_the_step("the attempt's journal cannot be written"):
            write_whole(self.path, json.dumps(content).encode())


def attempt_dir(state: Path, step_id: str, attempt: int) -> Path:
    """The folder of one attempt; ids come from the coordinator, so they are looked at first."""
    is_name = step_id.isascii() and step_id.replace("-", "").replace("_", "").isalnum()
    if not is_name or len(step_id) > 64 or not 0 < attempt < 2**31:
        raise ValueError(f"not a step and an attempt: {step_id[:80]!r}, {attempt}")
    return state / "a" / step_id / str(attempt)


def open_journals(state: Path) -> list[Journal]:
    """The journals of all attempts that are not done, sorted by step and attempt."""
    found = []
    for folder in sorted((state / "a").glob("*/*")):
        if not folder.name.isdecimal():
            continue
        journal = Journal.load(folder)
        if journal and not journal.is_done:
            found.append(journal)
    return sorted(found, key=lambda journal: (journal.step_id, journal.attempt))


def _free_name(path: Path) -> Path:
    """A name beside `path` under which nothing is set aside yet."""
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.unreadable-{number}")
        if not aside.exists():
            return aside
    return path.with_name(f"{path.name}.unreadable-1")
