"""How many failed logins there may be, and whose they are.

The name is counted as it was typed, whether or not somebody has it: a limit that only users have would tell
who is one.
"""

import hashlib
import unicodedata
from dataclasses import dataclass
from datetime import timedelta

from coordinator.rules.principals import peer_of


@dataclass(frozen=True)
class LoginLimits:
    """The failures that one account and one peer may have within the window."""

    per_account: int
    per_peer: int
    window: timedelta


def account_key(email: str) -> str:
    """Under which an account is counted; spellings that look the same are the same."""
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", email).casefold()).strip()
    return f"account:{hashlib.sha256(plain.encode('utf-8', 'replace')).hexdigest()}"


def peer_key(address: str) -> str:
    return f"peer:{peer_of(address)}"
