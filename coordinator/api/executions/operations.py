"""How this surface writes down its operations: prefix, common answers, form of its errors."""

from collections.abc import Mapping
from typing import Any

from coordinator.api.endpoint import Answer, Endpoint
from coordinator.api.executions.problems import executions_form
from coordinator.api.executions.shapes import ErrorBody
from coordinator.rules.access import Policy

PREFIX = "/api/v1"


def error(description: str) -> Answer:
    return Answer(description, ErrorBody)


COMMON = {
    400: error("Invalid request body or parameters"),
    401: error("Missing or invalid authentication"),
    403: error("Insufficient permissions"),
    404: error("Resource doesn't exist"),
    405: error("The path does not take this method"),
    408: error("The body was not complete in time"),
    413: error("The body is too large"),
    415: error("The body is not declared to be JSON in UTF-8"),
    429: error("Too many requests; see Retry-After"),
    500: error("Server error"),
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
    """An Endpoint below the prefix, with the answers that every operation can give."""
    return Endpoint(
        method=method,
        path=PREFIX + path,
        name=more.pop("name", f"execution_{handler.__name__}"),
        summary=summary,
        tag=tag,
        policy=policy,
        handler=handler,
        answers={**COMMON, **(errors or {}), **ok},
        form=executions_form,
        needs_credential=True,
        **more,
    )
