"""How the Build Execution API says that a request was refused."""

import json
import secrets
from collections.abc import Iterable

import structlog
from starlette.responses import Response

from coordinator.api.problems import Refusal
from shared.clock import to_wire, utc_now
from shared.faults import Fault

log = structlog.get_logger()

CODES = {
    400: "INVALID_REQUEST",
    401: "UNAUTHORIZED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    409: "CONFLICT",
    413: "PAYLOAD_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    429: "RATE_LIMITED",
    500: "INTERNAL_SERVER_ERROR",
    503: "UNAVAILABLE",
}


def executions_form(refused: Refusal) -> Response:
    """`{error, code, timestamp, trace_id, details}`; the trace id stands in our own log, too.

    `details` has the reason by the path of each field at fault.
    """
    trace_id = secrets.token_hex(16)
    code = CODES.get(refused.status, "INVALID_REQUEST")
    log.info("refused", trace_id=trace_id, status=refused.status, code=code, reason=refused.code)
    body = {
        "error": refused.sentence,
        "code": code,
        "timestamp": to_wire(utc_now()),
        "trace_id": trace_id,
        "details": _by_field(refused.details),
    }
    return Response(
        json.dumps(body, ensure_ascii=False).encode("utf-8", "replace"),
        status_code=refused.status,
        media_type="application/json",
        headers=dict(refused.headers),
    )


def _by_field(faults: Iterable[Fault]) -> dict[str, str]:
    found: dict[str, str] = {}
    for fault in faults:
        found[fault.path] = f"{found[fault.path]}; {fault.reason}" if fault.path in found else fault.reason
    return found
