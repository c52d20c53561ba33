"""What an e-mail address and an account may look like."""

import re

from shared.ids import is_id

MAX_EMAIL = 254
# Only plain ASCII: addresses that look the same are the same.
_EMAIL = re.compile(r"[a-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")


def canonical_email(text: str) -> str | None:
    """The one spelling of an address; None when it is none."""
    lowered = text.strip().lower()
    if len(lowered) > MAX_EMAIL or not lowered.isascii() or ".." in lowered:
        return None
    return lowered if _EMAIL.fullmatch(lowered) else None


def may_be_account(text: str) -> bool:
    """An account must not look like the id of another tenant."""
    return not is_id(text.lower())
