"""One heartbeat for all attempts: says that they live, and hears what to do with them."""

import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from runner.attempt import Attempt
from runner.client import Client
from runner.errors import LeaseLost, Refused, Revoked, Unreachable
from runner.health import Condition
from shared.protocol import Heartbeat, Order

log = structlog.get_logger()

JITTER = 0.2
MAX_INTERVAL_S = 60.0


class Pulse:
    """Beats in a thread of its own until it is stopped."""

    def __init__(
        self,
        client: Client,
        *,
        session: str,
        state: Path,
        attempts: Callable[[], Sequence[Attempt]],
        free_slots: Callable[[], int],
        is_draining: Callable[[], bool],
        superseded: Callable[[], None],
        condition: Callable[[], Condition] = Condition,
        revoked: Callable[[], None] = lambda: None,
        rotate: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._session = session
        self._state = state
        self._attempts = attempts
        self._free_slots = free_slots
        self._is_draining = is_draining
        self._superseded = superseded
        self._condition = condition
        self._revoked = revoked
        self._rotate = rotate
        self._interval_s = 5.0
        self._now = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def beat_soon(self) -> None:
        """Do not wait for the interval: there is news, such as claims to acknowledge."""
        self._now.set()

    def stop(self) -> None:
        self._stopping.set()
        self._now.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._stopping.is_set():
            pause = self._interval_s * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - jitter
            self._now.wait(pause)
            self._now.clear()
            if self._stopping.is_set():
                return
            try:
                self._beat()
            except Exception:  # whatever it was: without heartbeats every attempt here would be lost
                log.exception("heartbeat_failed")

    def _beat(self) -> None:
        # What is only being cleaned up must not come back to life by being named.
        alive = [attempt for attempt in self._attempts() if not attempt.is_over]
        held = {(attempt.proof.step_id, attempt.proof.attempt): attempt for attempt in alive}
        condition = self._condition()
        said = Heartbeat(
            session=self._session,
            draining=self._is_draining(),
            slots=self._free_slots(),
            disk_free=shutil.disk_usage(self._state).free,
            low_disk=condition.low_disk,
            paused_for_s=condition.paused_for_s,
            pause_reason=condition.pause_reason,
            attempts=[attempt.report() for attempt in held.values()],
        )
        try:
            answer = self._client.heartbeat(said)
        except Revoked:
            self._revoked()
            return
        except Unreachable as error:
            log.warning("heartbeat_unanswered", cause=str(error))
            return
        except (Refused, LeaseLost) as error:
            log.error("heartbeat_refused", cause=str(error))
            if isinstance(error, Refused) and error.code == "session_superseded":
                self._superseded()
            return
        self._interval_s = min(MAX_INTERVAL_S, max(0.5, answer.next))
        for order in answer.attempts:
            self._hand_on(held, order)
        if answer.rotate and self._rotate():
            self._now.set()  # the first use of the new secret ends the former one

    def _hand_on(self, held: dict[tuple[str, int], Attempt], order: Order) -> None:
        attempt = held.get((order.step_id, order.attempt))
        if attempt is not None:
            attempt.obey(order)
