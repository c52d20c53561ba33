"""Which refusal answers with which status, in one table, and what the Build Server API says about it."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Refusal:
    """What there is to say when a request is refused; each surface has its own form for it."""

    status: int
    code: str
    sentence: str
    details: tuple[Fault, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


Form = Callable[[Refusal], Response]


def refusal_of(error: CoordinatorError | guards.UnreadableBody) -> Refusal:
    """What there is to say of this error."""
    if isinstance(error, guards.UnreadableBody):
        status, code = _UNREADABLE[type(error)]
        return Refusal(status, code, str(error))
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
    return Refusal(status, error.code, error.message, error.details, extra, headers)


def build_server_form(refused: Refusal) -> Response:
    """The form of the Build Server API, and of everything that belongs to no surface."""
    return refusal(
        refused.status,
        refused.code,
        refused.sentence,
        refused.details,
        dict(refused.extra),
        dict(refused.headers),
    )


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
