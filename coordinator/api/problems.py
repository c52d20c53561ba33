"""Which refusal answers with which status, in one table, and what the Build Server API says about it."""

import json
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response

from coordinator import errors
from coordinator.api import guards
from coordinator.errors import CoordinatorError
from shared.faults import Fault

STATUS: dict[type[CoordinatorError], int] = {
    errors.Invalid: 400,
    errors.Unauthenticated: 401,
    errors.Denied: 403,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.LogGap: 416,
    errors.RangeNotSatisfiable: 416,
    errors.DigestMismatch: 422,
    errors.TooMany: 429,
    errors.Unavailable: 503,
}

_UNREADABLE = {
    guards.BodyTooLarge: (413, "too_large"),
    guards.BodyTooSlow: (408, "too_slow"),
    guards.ClientGone: (400, "client_gone"),
    guards.UnsupportedEncoding: (415, "unsupported_encoding"),
    guards.UnsupportedMediaType: (415, "unsupported_media_type"),
}


def status_of(error: CoordinatorError) -> int:
    """The status of the nearest class in the table."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return 500


def problem(error: CoordinatorError) -> Response:
    """The answer of the Build Server API to this refusal."""
    status = status_of(error)
    extra = {name: value for name in ("size", "limit") if (value := getattr(error, name, None)) is not None}
    headers = {}
    if status == 503:
        headers["Retry-After"] = "1"
    if isinstance(error, errors.TooMany):
        headers["Retry-After"] = str(error.retry_after_s)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, errors.RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.size}"
    return refusal(status, error.code, error.message, error.details, extra, headers)


def unreadable(error: guards.UnreadableBody) -> Response:
    """The answer to a body that cannot be had."""
    status, code = _UNREADABLE[type(error)]
    return refusal(status, code, str(error))


def refusal(
    status: int,
    code: str,
    sentence: str,
    details: Iterable[Fault] = (),
    extra: dict[str, Any] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """`{error, code, details}`: the published body of every error of this surface, and the word for it."""
    body = {
        "error": sentence,
        "code": code,
        "details": [{"path": fault.path, "reason": fault.reason} for fault in details],
        **(extra or {}),
    }
    return Response(
        json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"),
        status_code=status,
        media_type="application/json",
        headers=headers,
    )
