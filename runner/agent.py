"""The loop: a slot is free, take a step, hand it over; and what a restart and a stop mean."""

import secrets
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from runner.attempt import Attempt
from runner.client import Proof
from runner.errors import LeaseLost, Refused, StepError, Unreachable
from runner.insistence import insist
from runner.janitor import Janitor
from runner.journal import Journal, attempt_dir, open_journals
from runner.lease import Pulse
from runner.means import Means
from runner.slots import Slots
from runner.state_dir import PendingRequest
from runner.step_run import StepRun
from shared.protocol import Acquire, Action, Claim, Orders, Phase, Resume

log = structlog.get_logger()

WAIT_S = 25
ONCE_WAIT_S = 2
RESUME_LONGEST_S = 5.0
IDLE_PAUSE_S = 1.0
NO_ROOM_PAUSE_S = 5.0


class Agent:
    """One runner's life from start to stop."""

    def __init__(
        self,
        means: Means,
        state: Path,
        *,
        slots: int,
        labels: list[str],
        platform: str,
        version: str,
        once: bool,
        janitor: Janitor,
    ) -> None:
        self._means = means
        self._state = state
        self._labels = labels
        self._platform = platform
        self._version = version
        self._once = once
        self._janitor = janitor
        self._session = secrets.token_hex(8)
        self._slots = Slots(slots)
        self._attempts: dict[tuple[str, int], Attempt] = {}
        self._lock = threading.Lock()
        self._draining = threading.Event()
        self._shutdown = threading.Event()
        self._superseded = threading.Event()
        self._pending = PendingRequest(state)
        self._pulse = Pulse(
            means.client,
            session=self._session,
            state=state,
            attempts=self._held,
            free_slots=lambda: self._slots.free,
            is_draining=self._draining.is_set,
            superseded=self._step_aside,
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

    def _step_aside(self) -> None:
        log.error("superseded: a newer process of this runner has taken over")
        self._superseded.set()
        self._draining.set()

    # --- the life -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Until drained. Attempts of a former life are adopted before new steps are taken."""
        self._means.trash.start()
        self._janitor.sweep_leftovers()
        if not self._adopt():
            self._close_means()
            return
        self._pulse.start()
        self._janitor.start()
        try:
            self._poll_until_drained()
            while not self._slots.wait_until_idle(1.0) and not self._superseded.is_set():
                continue
            if not self._superseded.is_set():
                self._say_bye()
        finally:
            self._pulse.stop()
            self._janitor.stop()
            self._close_means()

    def _close_means(self) -> None:
        self._means.caches.close()
        self._means.executor.close()
        self._means.trash.close()

    def _poll_until_drained(self) -> None:
        """Polls in a thread of its own: a drain does not wait for the end of a long poll."""
        poller = threading.Thread(target=self._poll, name="poll", daemon=True)
        poller.start()
        while poller.is_alive() and not self._draining.wait(0.2):
            continue

    def _poll(self) -> None:
        try:
            self._take_steps()
        except Exception:
            log.exception("polling_failed")
            self._draining.set()

    def _take_steps(self) -> None:
        while not self._draining.is_set():
            if not self._slots.wait_until_free(IDLE_PAUSE_S):
                continue
            try:
                claims = self._acquire(self._slots.free)
            except OSError as error:
                log.error("no_step_taken", cause=str(error))  # the id of a request must be written down first
                self._draining.wait(NO_ROOM_PAUSE_S)
                continue
            for claim in claims:
                if self._draining.is_set():
                    self._release(claim, "the runner is draining")
                else:
                    self._begin(claim)
            if claims:
                self._pending.answered()
                self._pulse.beat_soon()
            elif self._once and self._slots.busy == 0:
                return

    def _acquire(self, slots: int) -> list[Claim]:
        request_id = self._pending.current(secrets.token_hex(12))
        said = Acquire(
            request_id=request_id,
            session=self._session,
            slots=max(1, slots),
            labels=self._labels,
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

    def _begin(self, claim: Claim) -> None:
        log.info("step_acquired", step=claim.step_id, attempt=claim.attempt, name=claim.name)
        folder = attempt_dir(self._state, claim.step_id, claim.attempt)
        try:
            journal = Journal.load(folder) or Journal.create(folder, claim.model_dump(mode="json"))
        except (OSError, StepError) as error:
            log.error("step_not_begun", step=claim.step_id, attempt=claim.attempt, cause=str(error))
            self._means.trash.throw(folder)
            self._release(claim, "the runner's disk is full")
            self._draining.wait(NO_ROOM_PAUSE_S)
            return
        self._work_on(journal, Attempt(Proof(claim.step_id, claim.attempt, claim.lease)))

    def _work_on(self, journal: Journal, attempt: Attempt) -> None:
        key = (attempt.proof.step_id, attempt.proof.attempt)
        with self._lock:
            if key in self._attempts:
                return  # the same claim, heard twice
            self._attempts[key] = attempt
        if self._shutdown.is_set():
            attempt.shut_down()

        def work(release: Callable[[], None]) -> None:
            try:
                StepRun(self._means, journal, attempt, completed=release).run()
            finally:
                with self._lock:
                    del self._attempts[key]

        self._slots.run(f"step-{attempt.proof.step_id[-8:]}", work)

    # --- a restart ----------------------------------------------------------------------------------

    def _adopt(self) -> bool:
        """Go on with the attempts a former process left, as the coordinator sees fit.

        False when this process is told to end before the coordinator has said so: the next one asks again.
        """
        journals = open_journals(self._state)
        held = {}
        for journal in journals:
            claim = Claim.model_validate(journal.claim)
            proof = Proof(claim.step_id, claim.attempt, claim.lease)
            held[claim.step_id, claim.attempt] = (journal, Attempt(proof, phase=Phase.RUNNING))
        said = Resume(session=self._session, attempts=[attempt.report() for _, attempt in held.values()])
        try:
            answer: Orders = insist(
                lambda: self._means.client.resume(said),
                given_up=self._draining,
                stopping=self._draining,
                longest_s=RESUME_LONGEST_S,
            )
        except (LeaseLost, Unreachable):
            log.warning("stopped_before_the_coordinator_answered", attempts=len(held))
            return False
        orders = {(order.step_id, order.attempt): order for order in answer.attempts}
        for key, (journal, attempt) in held.items():
            order = orders.get(key)
            log.info("attempt_adopted", step=key[0], attempt=key[1], phase=str(journal.phase))
            if order is None or order.action is Action.ABANDON:
                attempt.abandon()
            else:
                attempt.obey(order)
            self._work_on(journal, attempt)
        return True

    def _held(self) -> list[Attempt]:
        with self._lock:
            return list(self._attempts.values())

    def _say_bye(self) -> None:
        try:
            self._means.client.bye()
        except (Unreachable, Refused, LeaseLost) as error:
            log.info("bye_unanswered", cause=str(error))
