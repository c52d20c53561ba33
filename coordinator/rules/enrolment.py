"""When an enrolment token counts, and what it lets a machine be."""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol

MAX_USES = 10_000
DEFAULT_LIFETIME = timedelta(hours=24)
MAX_LIFETIME = timedelta(days=365)


class TokenState(StrEnum):
    """Whether a token lets anybody in, and why not."""

    USABLE = "usable"
    USED_UP = "used_up"
    EXPIRED = "expired"
    REVOKED = "revoked"


class Token(Protocol):
    """What of a token decides."""

    @property
    def uses(self) -> int: ...
    @property
    def max_uses(self) -> int: ...
    @property
    def expires_at(self) -> datetime: ...
    @property
    def revoked_at(self) -> datetime | None: ...


def state_of(token: Token, *, now: datetime) -> TokenState:
    """What was done to it goes before what became of it."""
    if token.revoked_at is not None:
        return TokenState.REVOKED
    if token.uses >= token.max_uses:
        return TokenState.USED_UP
    return TokenState.EXPIRED if token.expires_at <= now else TokenState.USABLE


def foreign_labels(allowed: Collection[str] | None, wanted: Sequence[str]) -> list[str]:
    """Those of the labels that a token does not give; None gives any."""
    return [] if allowed is None else [label for label in wanted if label not in allowed]
