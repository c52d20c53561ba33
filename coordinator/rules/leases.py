"""Who holds a step: the proof of a lease."""

import base64
import hmac


def lease_token(key: bytes, *, step_id: str, attempt: int, runner_id: str, request_id: str) -> str:
    """The proof that this runner holds this attempt. Nothing secret is stored: it can be made again."""
    said = "|".join((step_id, str(attempt), runner_id, request_id)).encode()
    digest = hmac.digest(key, said, "sha256")
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
