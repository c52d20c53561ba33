"""Who holds a step: the proof of a lease, and when an attempt that failed may run again."""

import base64
import hmac
from datetime import timedelta

from shared.reasons import Reason

MAX_INFRASTRUCTURE_RETRIES = 2


def lease_token(key: bytes, *, step_id: str, attempt: int, runner_id: str, request_id: str) -> str:
    """The proof that this runner holds this attempt. Nothing secret is stored: it can be made again."""
    said = "|".join((step_id, str(attempt), runner_id, request_id)).encode()
    digest = hmac.digest(key, said, "sha256")
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def may_retry(reason: Reason, *, retries: int, exclusive: bool) -> bool:
    """Only what the infrastructure broke runs again by itself, and never a step that must not."""
    return reason.is_infrastructure and not exclusive and retries < MAX_INFRASTRUCTURE_RETRIES


def retry_delay(retries: int) -> timedelta:
    """10 s, 20 s, 40 s ..."""
    return timedelta(seconds=10 * 2**retries)
