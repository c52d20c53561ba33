"""How this surface writes down its operations: common answers, policies and the two kinds of lists."""

from collections.abc import Mapping
from typing import Any

from coordinator.api.build_server.shapes import ErrorOut
from coordinator.api.endpoint import Answer, Endpoint
from coordinator.rules.access import Audience, Policy

USER = Audience.USER
RUNNER = Audience.RUNNER


def error(description: str) -> Answer:
    return Answer(description, ErrorOut)


COMMON = {
    400: error("Invalid request data"),
    401: error("No credential, or one that does not count"),
    403: error("Not allowed"),
    404: error("Not found"),
    405: error("The path does not take this method"),
    408: error("The body was not complete in time"),
    413: error("The body is too large"),
    415: error("The body is not declared to be JSON in UTF-8"),
    429: error("Too many requests; see Retry-After"),
    500: error("Internal server error"),
    503: error("Cannot be answered now; see Retry-After"),
}


def operation(
    method: str,
    path: str,
    handler: Any,
    summary: str,
    *,
    tag: str,
    policy: Policy,
    ok: Mapping[int, Answer],
    errors: Mapping[int, Answer] | None = None,
    **more: Any,
) -> Endpoint:
    """An Endpoint with the answers every operation can give."""
    return Endpoint(
        method=method,
        path=path,
        name=handler.__name__,
        summary=summary,
        tag=tag,
        policy=policy,
        handler=handler,
        answers={**COMMON, **(errors or {}), **ok},
        **more,
    )
