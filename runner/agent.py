"""The loop: a slot is free, take a step, hand it over; and what a restart and a stop mean."""

import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Set
from contextlib import suppress
from functools import partial
from pathlib import Path

import structlog
from pydantic import ValidationError

from runner.attempt import Attempt
from runner.cleaning import Cleaning
from runner.control import Standing
from runner.ear import Ear
from runner.errors import (
    EngineUnavailable,
    LeaseLost,
    Refused,
    Revoked,
    StepError,
    Unauthorized,
    Unreachable,
)
from runner.executor.images import registry_of
from runner.health import Health, Tried
from runner.insistence import insist
from runner.janitor import Janitor
from runner.journal import Journal, JournalPhase, attempt_dir, open_journals
from runner.lease import Pulse
from runner.means import Means
from runner.proof import Proof
from runner.rotation import rotate_secret
from runner.slots import Slots
from runner.state_dir import PendingRequest
from runner.step_run import StepRun
from runner.vigil import Vigil, Watched
from shared.protocol import Acquire, Action, Claim, Orders, Phase, Resume

log = structlog.get_logger()

WAIT_S = 25
ONCE_WAIT_S = 2
RESUME_LONGEST_S = 5.0
FORGOTTEN_S = 900.0  # for so long the coordinator has to say, without a break, that it knows no such runner
IDLE_PAUSE_S = 1.0
NO_ROOM_PAUSE_S = 5.0
TAKING_LONGEST_S = 150.0  # longer than what stands in a claim's way is removed for
LAST_ANSWER_S = 1.0
SHUT_DOWN_LONGEST_S = 420.0  # the longest grace a step may have, and two minutes for all that comes behind


class Agent:
    """One runner's life from start to stop."""

    def __init__(
        self,
        means: Means,
        state: Path,
        *,
        slots: int,
        labels: list[str],
        only_labelled: bool = False,
        platform: str,
        version: str,
        once: bool,
        janitor: Janitor,
    ) -> None:
        self._means = means
        self._state = state
        self._labels = labels
        self._only_labelled = only_labelled
        self._platform = platform
        self._version = version
        self._once = once
        self._janitor = janitor
        self._session = secrets.token_hex(8)
        self._slots = Slots(slots)
        self._attempts: dict[tuple[str, int], Attempt] = {}
        self._left_for_later: set[tuple[str, int]] = set()
        self._lock = threading.RLock()  # a signal may come while the main thread holds it
        self._health = Health(state, means.disk)
        self._draining = threading.Event()
        self._taking = threading.Lock()  # held from the look at `_draining` until a claim's work has begun
        self._shutdown = threading.Event()
        self._superseded = threading.Event()
        self._has_failed = False
        self._was_forgotten = False
        self._was_revoked = False
        self._pending = PendingRequest(state)
        self._poller = threading.Thread(target=self._poll, name="poll", daemon=True)
        self._pulse = Pulse(
            means.client,
            session=self._session,
            state=state,
            attempts=self._held,
            free_slots=lambda: self._slots.free,
            is_draining=self._draining.is_set,
            superseded=self._step_aside,
            condition=self._health.condition,
            revoked=self._end_revoked,
            rotate=partial(rotate_secret, means.client, state),
        )
        self._ear = Ear(
            means.client, session=self._session, is_busy=self._is_busy, heard=self._pulse.beat_soon
        )

    # --- orders from outside ------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no new steps; end when those that run have ended."""
        log.info("draining", running=self._slots.busy)
        self._draining.set()
        self._pulse.beat_soon()

    def shut_down(self) -> None:
        """Stop what runs, say so, and end."""
        log.warning("shutting_down", running=self._slots.busy)
        self._draining.set()
        self._shutdown.set()
        for attempt in self._held():
            attempt.shut_down()

    def standing(self) -> Standing:
        """What an operator who asks is told."""
        held = sorted(self._held(), key=_key)
        said = tuple(f"step {one.proof.step_id} attempt {one.proof.attempt}: {one.phase}" for one in held)
        return Standing(os.getpid(), self._draining.is_set(), said)

    def _step_aside(self) -> None:
        log.error("superseded: a newer process of this runner has taken over")
        self._superseded.set()
        self._draining.set()

    def _end_revoked(self) -> None:
        """Nobody wants what runs here any more, and nobody would hear of it."""
        if not self._was_revoked:
            log.error("runner_revoked: the coordinator has revoked this runner", running=self._slots.busy)
        self._was_revoked = True
        self._draining.set()
        for attempt in self._held():
            attempt.forget()

    @property
    def is_draining(self) -> bool:
        return self._draining.is_set()

    @property
    def was_forgotten(self) -> bool:
        """It has ended because the coordinator does not know this runner: what it held is given up."""
        return self._was_forgotten

    @property
    def was_revoked(self) -> bool:
        """It has ended because the coordinator has revoked it: what it held is given up."""
        return self._was_revoked

    # --- the life -----------------------------------------------------------------------------------

    def run(self) -> bool:
        """Until drained. Attempts of a former life are adopted before new steps are taken.

        False when it ends because of an error of its own.
        """
        self._means.trash.start()
        self._janitor.sweep_folder()
        if not self._adopt():
            self._close_means()
            return True
        self._pulse.start()
        self._ear.start()
        self._janitor.start(self._not_to_be_touched)
        try:
            self._poll_until_drained()
            self._wait_for_those_that_run()
            self._await_poller()
            self._pulse.stop()  # nothing is said behind the goodbye
            if not self._superseded.is_set() and not self._was_revoked:
                self._say_bye()
        finally:
            self._ear.stop()
            self._pulse.stop()
            self._janitor.stop()
            self._close_means()
        return not self._has_failed

    def _wait_for_those_that_run(self) -> None:
        """Without limit while steps may finish; what was told to stop and does not is left behind."""
        ends_at = None
        while not self._slots.wait_until_idle(1.0) and not self._superseded.is_set():
            if self._shutdown.is_set():
                ends_at = ends_at or time.monotonic() + SHUT_DOWN_LONGEST_S
                if time.monotonic() > ends_at:
                    log.error("steps_left", running=self._slots.busy, waited_s=SHUT_DOWN_LONGEST_S)
                    return

    def _close_means(self) -> None:
        self._means.caches.close()
        self._means.executor.close()
        self._means.trash.close()

    def _poll_until_drained(self) -> None:
        """Polls in a thread of its own: a drain does not wait for the end of a long poll."""
        self._poller.start()
        while self._poller.is_alive() and not self._draining.wait(0.2):
            continue
        if self._taking.acquire(timeout=TAKING_LONGEST_S):
            self._taking.release()  # whoever takes it from now on sees that this runner drains
        else:
            log.error("claim_begun_for_too_long", waited_s=TAKING_LONGEST_S)

    def _await_poller(self) -> None:
        """What it has just heard is given back before the goodbye; a long poll is not waited for."""
        if self._poller.is_alive():
            self._poller.join(LAST_ANSWER_S)

    def _poll(self) -> None:
        try:
            self._take_steps()
        except Exception:
            log.exception("polling_failed")
            self._has_failed = True
            self._draining.set()

    def _take_steps(self) -> None:
        while not self._draining.is_set():
            if not self._slots.wait_until_free(IDLE_PAUSE_S):
                continue
            if not self._health.may_take_steps():
                if self._once and self._slots.busy == 0:
                    return
                self._draining.wait(NO_ROOM_PAUSE_S)
                continue
            try:
                claims = self._acquire(self._slots.free)
            except OSError as error:
                log.error("no_step_taken", cause=str(error))  # the id of a request must be written down first
                self._draining.wait(NO_ROOM_PAUSE_S)
                continue
            begun = [self._begin_or_release(claim) for claim in claims]
            if claims:
                self._pending.answered()
                self._pulse.beat_soon()
                if not all(begun):
                    self._draining.wait(NO_ROOM_PAUSE_S)
            elif self._once and self._slots.busy == 0:
                return

    def _begin_or_release(self, claim: Claim) -> bool:
        with self._taking:
            if self._draining.is_set():
                why_not = "the runner is draining"
            elif self._health.condition().paused_for_s:
                why_not = "the runner pauses"  # it began to while it waited for this
            else:
                why_not = self._begin(claim)
        if why_not:
            self._release(claim, why_not)
        return not why_not

    def _acquire(self, slots: int) -> list[Claim]:
        request_id = self._pending.current(secrets.token_hex(12))
        said = Acquire(
            request_id=request_id,
            session=self._session,
            slots=max(1, slots),
            labels=self._labels,
            only_labelled=self._only_labelled,
            platform=self._platform,
            version=self._version,
            wait=ONCE_WAIT_S if self._once else WAIT_S,
            draining=False,
        )
        try:
            answer = insist(
                lambda: self._means.client.acquire(said),
                given_up=self._draining,
                stopping=self._draining,
            )
        except (LeaseLost, Unreachable):
            self._draining.wait(IDLE_PAUSE_S)
            return []  # draining; a claim that was on its way is released by its time limit
        except Refused as error:
            log.error("acquire_refused", cause=str(error))
            if error.code == "session_superseded":
                self._step_aside()
            self._draining.wait(IDLE_PAUSE_S)
            return []
        if not answer.claims:
            self._pending.answered()
        return answer.claims

    def _release(self, claim: Claim, why: str) -> None:
        try:
            self._means.client.release(Proof(claim.step_id, claim.attempt, claim.lease), why)
        except (Unreachable, Refused, LeaseLost) as error:
            log.info("release_unanswered", step=claim.step_id, cause=str(error))  # its time limit does it

    def _begin(self, claim: Claim) -> str:
        """Why it could not be, if so."""
        log.info("step_acquired", step=claim.step_id, attempt=claim.attempt, name=claim.name)
        folder = attempt_dir(self._state, claim.step_id, claim.attempt)
        attempt = Attempt(Proof(claim.step_id, claim.attempt, claim.lease), secrets=claim.secrets)
        if not self._hold(attempt):
            return ""  # the same claim, heard twice
        try:
            written = claim.model_dump(mode="json", exclude={"secrets"})
            journal = Journal.load(folder)
            if journal is None:
                self._janitor.make_way(_key(attempt))
                journal = Journal.create(folder, written, runner=self._means.runner_id)
        except EngineUnavailable as error:
            return self._not_begun(attempt, "what a former life left stands in its way", error)
        except (OSError, StepError) as error:
            self._means.trash.throw(folder)
            return self._not_begun(attempt, "the runner's disk is full", error)
        self._work_on(journal, attempt)
        return ""

    def _not_begun(self, attempt: Attempt, why: str, error: Exception) -> str:
        log.error(
            "step_not_begun", step=attempt.proof.step_id, attempt=attempt.proof.attempt, cause=str(error)
        )
        self._let_go(attempt)
        return why

    def _hold(self, attempt: Attempt) -> bool:
        """From here on heartbeats name it and nobody cleans up after it; False when it was so before."""
        with self._lock:
            if _key(attempt) in self._attempts:
                return False
            self._attempts[_key(attempt)] = attempt
            return True

    def _let_go(self, attempt: Attempt) -> None:
        with self._lock:
            del self._attempts[_key(attempt)]

    def _work_on(self, journal: Journal, attempt: Attempt) -> None:
        if self._shutdown.is_set():
            attempt.shut_down()

        def work(release: Callable[[], None]) -> None:
            try:
                self._run_step(journal, attempt, release)
            except Exception:
                self._janitor.clean_up_soon()  # the slot says in the log what it was
                raise

        self._slots.run(f"step-{attempt.proof.step_id[-8:]}", work)

    def _run_step(self, journal: Journal, attempt: Attempt, release: Callable[[], None]) -> None:
        def completed() -> None:
            has_image = not journal.phase.is_before(JournalPhase.CREATING) and "image_digest" in journal.data
            registry = registry_of(str(journal.claim.get("image", "")))
            tried = Tried(journal.step_id, registry, has_image)
            if self._health.note_completion(journal.data.get("completion"), tried):
                self._pulse.beat_soon()
            release()

        try:
            StepRun(self._means, journal, attempt, completed=completed).run()
            if attempt.shutdown.is_set() and not journal.is_done:
                with self._lock:
                    self._left_for_later.add(_key(attempt))
        finally:
            self._let_go(attempt)

    # --- a restart ----------------------------------------------------------------------------------

    def _adopt(self) -> bool:
        """Go on with the attempts a former process left, as the coordinator sees fit.

        False when this process is told to end before the coordinator has said so: the next one asks again.
        """
        journals = open_journals(self._state)
        held, watched = {}, []
        for journal in journals:
            try:
                claim = Claim.model_validate(journal.claim)
            except ValidationError as error:
                self._set_aside(journal, error)
                continue
            proof = Proof(claim.step_id, claim.attempt, claim.lease)
            is_over = not journal.phase.is_before(JournalPhase.CLEANING)
            attempt = Attempt(proof, phase=Phase.RUNNING, is_over=is_over)
            held[claim.step_id, claim.attempt] = (journal, attempt)
            job = Cleaning(self._means, journal, attempt, claim).job
            watched.append(Watched(journal, job, float(claim.limits.grace_s)))
        asked = [attempt.report() for _, attempt in held.values() if not attempt.is_over]
        said = Resume(session=self._session, attempts=asked)
        with Vigil(self._means.executor, watched):
            answer = self._hear_orders(said)
        if self._was_forgotten or self._was_revoked:
            self._give_up(held.values())
            return False
        if answer is None:
            log.warning("stopped_before_the_coordinator_answered", attempts=len(held))
            return False
        orders = {(order.step_id, order.attempt): order for order in answer.attempts}
        for key, (journal, attempt) in held.items():
            order = orders.get(key)
            log.info("attempt_adopted", step=key[0], attempt=key[1], phase=str(journal.phase))
            if order is None or order.action is Action.ABANDON:
                attempt.abandon()
            else:
                attempt.secrets = order.secrets
                attempt.obey(order)
            self._hold(attempt)
            self._work_on(journal, attempt)
        return True

    def _give_up(self, held: Collection[tuple[Journal, Attempt]]) -> None:
        """Nobody wants these attempts, under this runner's name or any other: kill them and clean up."""
        if self._was_revoked:
            log.error("runner_revoked: the coordinator has revoked this runner", attempts=len(held))
        else:
            log.error("runner_forgotten: the coordinator does not know this runner", attempts=len(held))
        for journal, attempt in held:
            attempt.forget()
            self._hold(attempt)
            self._work_on(journal, attempt)
        self._wait_for_those_that_run()

    def _hear_orders(self, said: Resume) -> Orders | None:
        """Ask until the coordinator answers, however long that takes; None when this process is to end.

        So it is when the coordinator has forgotten this runner, too: that it says so once is not believed.
        """
        unknown_since: float | None = None

        def ask() -> Orders:
            nonlocal unknown_since
            try:
                return self._means.client.resume(said)
            except (LeaseLost, Refused) as error:
                unknown_since = None
                raise Unreachable(f"no orders: {error}") from error  # nothing is given up for that
            except Revoked as error:
                self._was_revoked = True
                raise LeaseLost("this runner was revoked") from error
            except Unauthorized as error:
                if not error.is_unknown:
                    unknown_since = None
                elif unknown_since is None:
                    unknown_since = time.monotonic()
                elif time.monotonic() - unknown_since >= FORGOTTEN_S:
                    self._was_forgotten = True
                    raise LeaseLost("this runner is forgotten") from error
                raise
            except Unreachable:
                unknown_since = None
                raise

        while not self._draining.is_set() and not self._was_forgotten and not self._was_revoked:
            with suppress(LeaseLost, Unreachable):  # a day of trying, or draining
                return insist(
                    ask, given_up=self._draining, stopping=self._draining, longest_s=RESUME_LONGEST_S
                )
        return None

    def _set_aside(self, journal: Journal, error: ValidationError) -> None:
        """One claim that cannot be understood must not keep the runner from all its other work."""
        aside = journal.path.with_name(f"{journal.path.name}.unreadable-claim")
        journal.path.rename(aside)
        log.error("claim_unreadable", path=str(journal.path), set_aside=str(aside), error=str(error))
        self._janitor.clean_up_soon()

    def _not_to_be_touched(self) -> Set[tuple[str, int]]:
        """The attempts in hand, and those which a shutdown left for the next process."""
        with self._lock:
            return self._attempts.keys() | self._left_for_later

    def _held(self) -> list[Attempt]:
        with self._lock:
            return list(self._attempts.values())

    def _is_busy(self) -> bool:
        """Whether there is an attempt that could be told to stop."""
        return any(not attempt.is_over and not attempt.must_stop for attempt in self._held())

    def _say_bye(self) -> None:
        try:
            self._means.client.bye()
        except (Unreachable, Refused, LeaseLost) as error:
            log.info("bye_unanswered", cause=str(error))


def _key(attempt: Attempt) -> tuple[str, int]:
    return attempt.proof.step_id, attempt.proof.attempt
