"""`Idempotency-Key`: a creation that is sent again gets its answer again, and nothing is made twice.

The answer is written down in the transaction of the change: after a crash there are both or neither.
"""

import hashlib
import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, TypeVar

from pydantic import BaseModel
from sqlmodel import Session
from starlette.responses import Response

from coordinator.api.endpoint import Call
from coordinator.errors import Conflict, Invalid
from coordinator.rules.principals import principal_of
from coordinator.store import kept_answers
from coordinator.store.kept_answers import Asked
from shared.faults import Fault

T = TypeVar("T")

KEY_HEADER = "Idempotency-Key"
REPLAY_HEADER = "Idempotent-Replay"
KEY_PATTERN = "[!-~]{1,255}"


async def make_once(
    call: Call, action: Callable[..., T], /, *args: Any, answer: Callable[[T], Response], **named: Any
) -> Response:
    """Run an action as `call.write` does and answer it, or answer as the same request was answered before.

    `answer` runs within the transaction: it makes the response out of what the action returned, no more.
    """
    asked = _asked(call)
    if asked is None:
        return answer(await call.write(action, *args, **named))
    life = timedelta(hours=call.state.settings.idempotency_hours)

    def once(tx: Session, *, now: datetime) -> Response:
        kept = kept_answers.claim(tx, asked, now=now, life=life)
        if kept is None:
            made = answer(action(tx, *args, now=now, **named))
            _keep(tx, asked, made)
            return made
        if kept.request_sha256 != asked.request_sha256:
            raise Conflict(f"this {KEY_HEADER} was sent with another request before")
        return Response(
            kept.body, kept.status, media_type="application/json", headers={REPLAY_HEADER: "true"}
        )

    return await call.write(once)


def _keep(tx: Session, asked: Asked, made: Response) -> None:
    if 200 <= made.status_code < 300:
        kept_answers.keep(tx, asked, made.status_code, bytes(made.body).decode())
    else:
        kept_answers.drop(tx, asked)


def _asked(call: Call) -> Asked | None:
    """What the request asks to be answered once; None when it does not."""
    values = call.request.headers.getlist(KEY_HEADER)
    if not values:
        return None
    if len(values) > 1:
        raise _bad_key("must be sent once")
    if re.fullmatch(KEY_PATTERN, values[0]) is None:
        raise _bad_key("must be 1 to 255 visible characters of ASCII")
    caller = call.caller
    principal = f"{principal_of(caller.user_id, caller.credential)} {caller.tenant_id}"
    said = [call.endpoint.method, call.endpoint.path.format(**call.path), _said(call.body)]
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return Asked(principal, values[0], hashlib.sha256(canonical.encode()).hexdigest())


def _said(body: BaseModel | None) -> dict[str, Any] | None:
    """What a body says, however it is written: an id in capitals, a null for what may be left out.

    Where a body is optional, an empty one says no more than none.
    """
    return (body.model_dump(mode="json", by_alias=True, exclude_none=True) or None) if body else None


def _bad_key(reason: str) -> Invalid:
    return Invalid(f"the header {KEY_HEADER} {reason}", details=(Fault(KEY_HEADER, reason),))
