"""Wakes what waits in this process; rung after a commit, while polling stays the truth."""

import asyncio
from collections import defaultdict

READY = "ready"
STOPS = "stops"


class Bell:
    """Topics with waiters; nothing is remembered for who comes later."""

    def __init__(self) -> None:
        self._waiters: dict[str, set[asyncio.Future[None]]] = defaultdict(set)
        self.is_closed = False

    def ring(self, *topics: str) -> None:
        for topic in topics:
            for waiter in self._waiters.pop(topic, ()):
                if not waiter.done():
                    waiter.set_result(None)

    def close(self) -> None:
        """The process ends: wake everybody, who then sees that nothing is worth waiting for here."""
        self.is_closed = True
        self.ring(*list(self._waiters))

    def listen(self, topic: str) -> "Ear":
        """Start listening now, so that a ring between a look and the wait is not missed."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[topic].add(waiter)
        return Ear(self, topic, waiter)

    def forget(self, topic: str, waiter: asyncio.Future[None]) -> None:
        waiters = self._waiters.get(topic)
        if waiters is not None:
            waiters.discard(waiter)
            if not waiters:
                del self._waiters[topic]


class Ear:
    """One listener of one topic, for one ring."""

    def __init__(self, bell: Bell, topic: str, waiter: asyncio.Future[None]) -> None:
        self._bell = bell
        self._topic = topic
        self._waiter = waiter

    async def wait(self, timeout_s: float) -> bool:
        """True when the bell rang within the time."""
        done, _ = await asyncio.wait([self._waiter], timeout=max(0.0, timeout_s))
        return bool(done)

    def close(self) -> None:
        self._bell.forget(self._topic, self._waiter)


def log_topic(step_id: str) -> str:
    return f"log:{step_id}"


def build_log_topic(build_id: str) -> str:
    return f"build-log:{build_id}"
