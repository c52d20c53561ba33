"""Brings an attempt's log to the coordinator, in order, however often it goes away."""

import threading
from concurrent.futures import ThreadPoolExecutor

import structlog

from runner.attempt import Attempt
from runner.client import Client
from runner.errors import LeaseLost, LogLimit, LogRewind, Refused
from runner.insistence import LAST_WORDS_S, GaveUp, insist
from runner.log_stream import Chunk, LogStream
from shared.paths import MAX_APPEND_BYTES
from shared.protocol import Action, LogAccepted

log = structlog.get_logger()

PAUSE_S = 0.25
WAIT_S = 1.0
STOP_S = 5.0


class LogDelivery:
    """One thread per attempt; whatever is in the log file gets there, or the attempt is given up."""

    def __init__(self, client: Client, attempt: Attempt, stream: LogStream) -> None:
        self._client = client
        self._attempt = attempt
        self._stream = stream
        self._finishing = threading.Event()
        self._hurrying = threading.Event()
        self._ahead: Chunk | None = None  # read while the one before it was sent
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="log-reader")
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._is_over = True
        self._closes_at_its_end = False
        self.is_truncated = False
        self.failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="log-delivery", daemon=True)

    def start(self) -> None:
        self._is_over = False
        self._thread.start()

    def hurry(self) -> None:
        """The script has ended: from now on nothing is gained by waiting for more lines."""
        self._hurrying.set()

    def finish(self) -> None:
        """Nobody writes any more: deliver the rest and wait until it is there."""
        self._finishing.set()
        self._hurrying.set()
        self._stream.finish()  # last: who is woken by it must not wait for more lines once again
        while self._thread.is_alive():
            self._thread.join(0.5)
        if self.failure is not None:
            raise self.failure

    def rewind(self, size: int) -> None:
        """The coordinator says it holds `size` bytes: send what follows, again if need be."""
        self._go_back(size)
        while not self._is_at_end:
            if not self._send_next():
                break

    def stop(self) -> None:
        """Leave it as it is: the attempt is given up, or this process ends."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def close(self) -> None:
        """`stop`, and close the log: at once, or when the request that is still under way has ended.

        A descriptor that was closed under a reader may already be that of another step's log.
        """
        self.stop()
        with self._ending:
            self._closes_at_its_end = not self._is_over
            if self._closes_at_its_end:
                return
        self._stream.close()

    def _run(self) -> None:
        try:
            self._deliver()
        finally:
            self._reader.shutdown(wait=False)
            with self._ending:
                self._is_over = True
            if self._closes_at_its_end:
                self._stream.close()

    def _deliver(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._is_at_end and self._finishing.is_set():
                    return
                if self._ahead is None and not self._finishing.is_set():
                    self._stream.wait(WAIT_S)
                    self._gather()
                if not self._send_next() and self._finishing.is_set() and self._is_at_end:
                    return
        except LeaseLost as error:
            self.failure = error
            self._attempt.abandon()  # so that the thread that watches the script ends it
        except (GaveUp, Refused) as error:
            self.failure = error
        except Exception as error:
            log.exception("log_delivery_failed", step=self._attempt.proof.step_id)
            self.failure = error

    def _gather(self) -> None:
        """A moment's wait makes one request of many lines; nobody waits longer than that for a line."""
        if self._stream.waiting < MAX_APPEND_BYTES:
            self._hurrying.wait(PAUSE_S)

    @property
    def _is_at_end(self) -> bool:
        return self._ahead is None and self._stream.is_at_end

    def _go_back(self, size: int) -> None:
        self._ahead = None
        self._stream.rewind(size)

    def _send_next(self) -> bool:
        """Send what comes next; False when there is nothing."""
        with self._lock:
            chunk, self._ahead = self._ahead or self._stream.read(MAX_APPEND_BYTES), None
            if chunk is None:
                return False
            try:
                self._ahead = self._send_and_read_on(chunk)
            except LogRewind as order:
                self._go_back(order.size)
            except LogLimit as order:
                self.is_truncated = True
                self._stream.stop(min(order.limit, chunk.offset + len(chunk.data)))
            return True

    def _send_and_read_on(self, chunk: Chunk) -> Chunk | None:
        """Send it, and make what follows meanwhile where there is more than one request can take."""
        if len(chunk.data) < MAX_APPEND_BYTES or self._is_over:
            self._send(chunk.offset, chunk.data)
            return None
        following = self._reader.submit(self._stream.read, MAX_APPEND_BYTES)
        try:
            self._send(chunk.offset, chunk.data)
        finally:
            ahead = following.result()  # a single thread reads at any time
        return ahead

    def _send(self, offset: int, data: bytes) -> None:
        answer: LogAccepted = insist(
            lambda: self._client.append_log(self._attempt.proof, offset, data),
            given_up=self._attempt.abandoned,
            stopping=self._attempt.shutdown,
            last_words_s=LAST_WORDS_S,
        )
        self._attempt.log_size = answer.size
        if answer.action is Action.CANCEL:
            self._attempt.cancel("cancelled")
        if answer.size < offset + len(data):
            raise LogRewind(answer.size)
