"""Carries requests into an application of this process, without a socket."""

import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from starlette.types import ASGIApp


class InProcess(httpx.BaseTransport):
    """For code that is not in an event loop; the application answers in one of its own.

    A client that is used as a context enters and leaves this as well.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._transport = httpx.ASGITransport(app=app, client=("127.0.0.1", 0))
        self._context = start_blocking_portal("asyncio")
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> "InProcess":
        self._portal = self._context.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._portal = None
        self._context.__exit__(None, None, None)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        assert self._portal is not None  # noqa: S101 - it is used as a context
        return self._portal.call(self._carry, request)

    async def _carry(self, request: httpx.Request) -> httpx.Response:
        answer = await self._transport.handle_async_request(request)
        content = await answer.aread()
        return httpx.Response(answer.status_code, headers=answer.headers, content=content, request=request)
