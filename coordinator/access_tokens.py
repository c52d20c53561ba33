"""Signed access tokens (JWT): the only file that knows their form.

One algorithm, an own audience, and keys that are found by `kid` in a list of ours alone: what else a token
says about how it is to be checked is not believed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt

from coordinator.errors import Unauthenticated
from shared.ids import new_id

ALGORITHM = "HS256"
ISSUER = "buildmill"
AUDIENCE = "buildmill:user"
MIN_KEY_BYTES = 32
MIN_DIFFERENT_BYTES = 8
LEEWAY = timedelta(seconds=30)
MAX_LIFETIME = timedelta(days=1)
_REQUIRED = ("iss", "aud", "sub", "sid", "iat", "exp")
_HEADERS = frozenset({"alg", "typ", "kid"})
_NOT_KNOWN = "this token is not known"


@dataclass(frozen=True)
class AccessToken:
    """What a token that counts says: who, in which session, until when."""

    user_id: str
    login_id: str
    expires_at: datetime


class AccessTokens:
    """Signs with the first key; each of them verifies, so that keys can be replaced one by one."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if len(key) < MIN_KEY_BYTES or len(set(key)) < MIN_DIFFERENT_BYTES:
                raise ValueError(f"a key needs {MIN_KEY_BYTES} random bytes")
        if not keys:
            raise ValueError("at least one key is needed")
        self._keys = {key_id(key): key for key in keys}
        self._first = key_id(keys[0])

    def sign(
        self, user_id: str, login_id: str, *, now: datetime, lifetime: timedelta
    ) -> tuple[str, datetime]:
        """A token and the moment from which it no longer counts."""
        expires_at = (now + lifetime).replace(microsecond=0)
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": user_id,
            "sid": login_id,
            "jti": new_id(),
            "iat": int(now.timestamp()),
            "exp": int(expires_at.timestamp()),
        }
        headers = {"kid": self._first}
        return jwt.encode(claims, self._keys[self._first], ALGORITHM, headers=headers), expires_at

    def verify(self, token: str, *, now: datetime) -> AccessToken:
        """What the token says, or Unauthenticated."""
        try:
            header = jwt.get_unverified_header(token)
            key = self._keys.get(_text(header.get("kid")))
            if key is None or not _HEADERS.issuperset(header):
                raise Unauthenticated(_NOT_KNOWN)
            claims = jwt.decode(
                token,
                key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                options={
                    "require": list(_REQUIRED),
                    "strict_aud": True,
                    # our own clock decides, below
                    "verify_exp": False,
                    "verify_iat": False,
                    "verify_nbf": False,
                },
            )
        except (jwt.PyJWTError, ValueError, RecursionError) as error:
            raise Unauthenticated(_NOT_KNOWN) from error
        return _in_time(claims, now)


def key_id(key: bytes) -> str:
    """The name by which a token says which key it was signed with; tells nothing of the key."""
    return hashlib.sha256(b"buildmill access token key\0" + key).hexdigest()[:16]


def _in_time(claims: dict[str, Any], now: datetime) -> AccessToken:
    issued, expires = _moment(claims["iat"]), _moment(claims["exp"])
    begins = _moment(claims["nbf"]) if "nbf" in claims else issued
    if expires - issued > MAX_LIFETIME or max(issued, begins) > now + LEEWAY:
        raise Unauthenticated("this token does not count yet, or for too long")
    if expires <= now:
        raise Unauthenticated("this token has expired")
    return AccessToken(_text(claims["sub"]), _text(claims["sid"]), expires)


def _moment(seconds: object) -> datetime:
    if type(seconds) is not int or not 0 <= seconds < 2**33:
        raise Unauthenticated(_NOT_KNOWN)
    return datetime.fromtimestamp(seconds, UTC)


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 64:
        raise Unauthenticated(_NOT_KNOWN)
    return value
