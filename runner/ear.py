"""Hears at once that an attempt is to stop, where the next heartbeat would say so only seconds later.

What is heard decides nothing: it has the next heartbeat come now, and that one brings the orders.
"""

import threading
from collections.abc import Callable

import structlog

from runner.client import Client
from runner.errors import LeaseLost, Refused, Unreachable
from shared.protocol import Listen

log = structlog.get_logger()

WAIT_S = 25
BETWEEN_S = 0.2  # nothing is missed in between: what is asked for is what is so, not what happens
IDLE_S = 1.0
AWAY_S = 5.0
REFUSED_S = 60.0  # a coordinator of an older version has no such path


class Ear:
    """Listens in a thread of its own, as long as there is work that could be stopped."""

    def __init__(
        self,
        client: Client,
        *,
        session: str,
        is_busy: Callable[[], bool],
        heard: Callable[[], None],
    ) -> None:
        self._client = client
        self._session = session
        self._is_busy = is_busy
        self._heard = heard
        self._since = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ear", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """A wait that is under way is left to itself."""
        self._stopping.set()

    def _run(self) -> None:
        pause_s = 0.0
        while not self._stopping.wait(pause_s):
            if not self._is_busy():
                pause_s = IDLE_S
                continue
            try:
                pause_s = self._listen()
            except Exception:  # whatever it was: a runner that cannot hear still has its heartbeats
                if not self._stopping.is_set():
                    log.exception("listening_failed")
                pause_s = AWAY_S

    def _listen(self) -> float:
        """How long to wait until the next time."""
        try:
            news = self._client.listen(Listen(session=self._session, since=self._since, wait=WAIT_S))
        except Unreachable as error:
            return max(AWAY_S, error.retry_after_s or 0.0)
        except (Refused, LeaseLost) as error:
            log.info("not_listening", cause=str(error))
            return REFUSED_S
        if news is not None and not self._stopping.is_set():
            self._since = news.since
            self._heard()
        return BETWEEN_S
