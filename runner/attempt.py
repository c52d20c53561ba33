"""One attempt in this runner's hands: its proof, how far it is, and what it has been told."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from runner.proof import Proof
from shared.protocol import Action, AttemptReport, Order, Phase


@dataclass
class Attempt:
    """Shared by the thread that works on it and the one that hears the coordinator."""

    proof: Proof
    phase: Phase = Phase.PULLING
    log_size: int = 0
    cancel_reason: str = ""
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # in memory only
    is_over: bool = False  # the coordinator has nothing more to say about it, and is not asked
    told: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    shutdown: threading.Event = field(default_factory=threading.Event)
    forgotten: threading.Event = field(default_factory=threading.Event)

    def report(self) -> AttemptReport:
        return AttemptReport(
            step_id=self.proof.step_id,
            attempt=self.proof.attempt,
            lease=self.proof.lease,
            phase=self.phase,
            log_size=self.log_size,
        )

    def obey(self, order: Order) -> None:
        """Take an order; what was ordered is never taken back."""
        if order.action is Action.CANCEL:
            self.cancel(order.reason or "cancelled")
        elif order.action is Action.ABANDON:
            self.abandon()

    def cancel(self, reason: str) -> None:
        if not self.cancelled.is_set():
            self.cancel_reason = reason
            self.cancelled.set()
            self.told.set()

    def abandon(self) -> None:
        self.abandoned.set()
        self.told.set()

    def forget(self) -> None:
        """There is nobody any more who knows of it: it is given up, and told to no one."""
        self.forgotten.set()
        self.abandon()

    def shut_down(self) -> None:
        self.shutdown.set()
        self.told.set()

    @property
    def must_stop(self) -> bool:
        return self.told.is_set()
