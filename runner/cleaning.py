"""Takes away what an attempt made on this machine, and proves it where somebody waits for the proof.

A successful or failed attempt is removed without a word. One that was cancelled or given up is killed,
removed, looked for once more by asking the engine and the disk, and only then told as clean; its journal
stays until the coordinator has heard that, so that a runner that is killed in between goes on with it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import structlog

from runner.attempt import Attempt
from runner.deadline import Moment
from runner.errors import EngineUnavailable, LeaseLost, Refused, StepError
from runner.executor.base import Job
from runner.insistence import GaveUp, insist
from runner.journal import FILE_NAME, Journal, JournalPhase
from runner.means import Means
from runner.mounts import mounts_below
from runner.trash import remove_tree
from shared.protocol import Claim, Cleaned

log = structlog.get_logger()

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
# What withstands for longer is named to the coordinator, and goes on being removed.
PATIENCE_S = 60.0
GIVE_UP_S = 24 * 3600.0
MOST_LEFTOVERS = 100


class Cleaning:
    """The end of one attempt; every part of it may be done twice."""

    def __init__(self, means: Means, journal: Journal, attempt: Attempt, claim: Claim) -> None:
        self._means = means
        self._journal = journal
        self._attempt = attempt
        self._folder = journal.folder
        self.job = Job(
            runner=means.runner_of(journal),
            step_id=claim.step_id,
            attempt=claim.attempt,
            build_id=claim.build_id,
            image=claim.image,
            attempt_dir=self._folder,
            workspace=self._folder / "ws",
        )
        self._caches = len(claim.mounts)
        self._has_freed = False

    def clean_up(self) -> None:
        """Only after the completion was acknowledged: container, caches, workspace, folder."""
        self._means.executor.destroy(self.job)
        self._close_workspace()
        self._throw_folder()

    def prove(self, *, free: Callable[[], None]) -> None:
        """Kill and remove everything, and tell the coordinator when nothing is left.

        `free` gives the slot back. What cannot be removed is told by name, and is tried again for a day.
        """
        self._attempt.is_over = True
        self._advance(JournalPhase.CLEANING)
        began, pause_s, told = Moment.now(), FIRST_PAUSE_S, None
        while True:
            leftovers = self._remove_all(free)
            if not leftovers or (leftovers != told and began.age_s() > PATIENCE_S):
                self._report(leftovers)
                told = leftovers
            if not leftovers:
                break
            if began.age_s() > GIVE_UP_S:
                return  # from here on it is the janitor's
            log.warning("attempt_not_clean", job=self.job.name, leftovers=leftovers[:10])
            if self._attempt.shutdown.wait(pause_s):
                raise GaveUp("this process ends; the next one goes on cleaning up")
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
        self._advance(JournalPhase.DONE)
        self._throw_folder()

    # --- removing -----------------------------------------------------------------------------------

    def _remove_all(self, free: Callable[[], None]) -> list[str]:
        """What withstands, by name; nothing when all is gone."""
        try:
            self._means.executor.kill(self.job, hard=True)
            self._stamp("dead")
            self._free_once(free)
            self._means.executor.destroy(self.job)
            remains = self._means.executor.remains(self.job)
            if remains:
                return sorted(remains)[:MOST_LEFTOVERS]
            self._close_workspace()
            self._empty_folder()
        except (EngineUnavailable, StepError, OSError) as error:
            log.warning("cleaning_up_failed", job=self.job.name, cause=str(error))
            return [f"{self.job.name}: {error}"[:512]]
        left = self._left_on_disk()
        if not left:
            self._stamp("cleaned")
        return left

    def _free_once(self, free: Callable[[], None]) -> None:
        """The slot is free as soon as nothing runs in it; deleting and telling take none."""
        if not self._has_freed:
            self._has_freed = True
            free()

    def _close_workspace(self) -> None:
        for index in range(self._caches):
            cache = self._means.caches.find(self._folder, index)
            if cache is not None:
                self._means.caches.discard(cache)
        found = self._means.workspaces.find(self._folder)
        if found is not None:
            self._means.workspaces.close(found)

    def _empty_folder(self) -> None:
        """Delete all but the journal now, and not some time later: only what is gone can be told as gone."""
        for entry in sorted(self._folder.iterdir()):
            if entry.name != FILE_NAME:
                remove_tree(entry)

    def _left_on_disk(self) -> list[str]:
        mounts = [f"mount {path}" for path in mounts_below(self._folder)]
        files = [f"file {entry}" for entry in self._folder.iterdir() if entry.name != FILE_NAME]
        return [name[:512] for name in sorted(mounts + files)][:MOST_LEFTOVERS]

    def _throw_folder(self) -> None:
        self._means.trash.throw(self._folder)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()  # another attempt of the step may still stand there

    # --- telling ------------------------------------------------------------------------------------

    def _stamp(self, what: str) -> None:
        """When it was first so; a former life's word counts, unless the machine has booted since."""
        if Moment.recorded(self._journal.data.get(what)) is None:
            self._advance(self._journal.phase, **{what: Moment.now().record()})

    def _report(self, leftovers: list[str]) -> None:
        """Said until it is heard, for a day: ages grow meanwhile, moments stay what they were."""
        try:
            insist(
                lambda: self._means.client.cleaned(self._attempt.proof, self._make_report(leftovers)),
                given_up=self._attempt.forgotten,  # it is abandoned already, and that is what this tells
                stopping=self._attempt.shutdown,
            )
        except (LeaseLost, Refused) as error:
            log.info("cleaned_not_wanted", job=self.job.name, cause=str(error))
        else:
            log.info("attempt_cleaned", job=self.job.name, leftovers=len(leftovers))

    def _make_report(self, leftovers: list[str]) -> Cleaned:
        data = self._journal.data
        term, dead, cleaned = (Moment.recorded(data.get(what)) for what in ("term", "dead", "cleaned"))
        return Cleaned(
            term_age_s=term.age_s() if term else None,
            dead_age_s=dead.age_s() if dead else None,
            cleaned_age_s=cleaned.age_s() if cleaned and not leftovers else 0.0,
            leftovers=leftovers,
        )

    def _advance(self, phase: JournalPhase, **data: Any) -> None:
        """A full disk keeps nobody from cleaning up; a runner that dies then does it once more."""
        try:
            self._journal.advance(phase, **data)
        except (StepError, OSError) as error:
            log.warning("journal_not_written", job=self.job.name, cause=str(error))
