"""What a network between runner and coordinator does to requests, on the runner's side and on the other."""

import asyncio
import threading
import time
from collections import Counter

import httpx
from starlette.types import ASGIApp, Message, Receive, Scope, Send


def verb_of(method: str, path: str) -> str:
    """The short name of a request of the runner protocol: acquire, start, log, put_blob ..."""
    last = path.rstrip("/").split("/")
    if "blobs" in last:
        return f"{method.lower()}_blob"
    return last[-1]


class Wire(httpx.BaseTransport):
    """Carries a runner's requests to the coordinator, and may fail as networks do.

    `lose_answers[verb]`: so many requests have their effect and no answer. `repeat[verb]`: so many arrive
    twice, and the second answer is the one that is seen. Nothing arrives while it `is_unplugged`.
    """

    def __init__(self, *, lose: dict[str, int] | None = None, repeat: dict[str, int] | None = None) -> None:
        self._inner = httpx.HTTPTransport()
        self._lock = threading.Lock()
        self.is_unplugged = False
        self.lose_answers: Counter[str] = Counter(lose or {})
        self.repeat: Counter[str] = Counter(repeat or {})
        self.sent: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        verb = verb_of(request.method, request.url.path)
        if self.is_unplugged:
            self.failed[verb] += 1
            raise httpx.ConnectError("unplugged", request=request)
        body = request.read()
        self.sent[verb] += 1
        if self._takes(self.repeat, verb):
            self._inner.handle_request(_again(request, body)).read()
        answer = self._inner.handle_request(_again(request, body))
        if self.is_unplugged or self._takes(self.lose_answers, verb):
            answer.read()
            raise httpx.ReadError("the answer was lost", request=request)
        return answer

    def close(self) -> None:
        self._inner.close()

    def _takes(self, fault: Counter[str], verb: str) -> bool:
        with self._lock:
            fault[verb] -= 1
            if fault[verb] < 0:
                fault[verb] = 0
                return False
            return True


def _again(request: httpx.Request, body: bytes) -> httpx.Request:
    headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"transfer-encoding"]
    return httpx.Request(
        request.method, request.url, headers=headers, content=body, extensions=request.extensions
    )


class Gate:
    """Stands before the application and stops requests of a kind there, before or after their effect.

    A process that waits at the gate is at a known place of its work: the moment to kill it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._before: set[str] = set()
        self._after: set[str] = set()
        self._arrived: dict[str, threading.Event] = {}
        self._times: dict[str, list[float]] = {}

    def times_of(self, verb: str) -> list[float]:
        """When requests of this kind came, on the machine's monotonic clock."""
        return list(self._times.get(verb, ()))

    def hold_before(self, verb: str) -> threading.Event:
        """From now on these requests wait without effect; the event tells that one has come."""
        self._arrived[verb] = threading.Event()
        self._before.add(verb)
        return self._arrived[verb]

    def hold_after(self, verb: str) -> threading.Event:
        """From now on these requests have their effect, and their answers wait."""
        self._arrived[verb] = threading.Event()
        self._after.add(verb)
        return self._arrived[verb]

    def open(self) -> None:
        self._before.clear()
        self._after.clear()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        verb = verb_of(scope["method"], scope["path"])
        self._times.setdefault(verb, []).append(time.monotonic())
        await self._wait(verb, self._before)

        async def send_later(message: Message) -> None:
            await self._wait(verb, self._after)
            await send(message)

        await self._app(scope, receive, send_later)

    async def _wait(self, verb: str, held: set[str]) -> None:
        while verb in held:
            self._arrived[verb].set()
            await asyncio.sleep(0.01)
