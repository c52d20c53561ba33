"""Refresh tokens: which one follows which, and whose one is, however long ago it was replaced.

A token is `<login>.<word>.<seal>`. The seal is ours alone, so a token that is shown is one that we have given
out for that login; the word leads to the next word, so that each token has one successor and no other.
"""

import base64
import hashlib
import hmac


def token_of(key: bytes, login_id: str, word: str) -> str:
    """The token of a login that has this word."""
    return f"{login_id}.{word}.{_digest(key, b'refresh token seal', f'{login_id}.{word}')}"


def login_of(key: bytes, token: str) -> str | None:
    """The id of the login that the token was given out for, None where it is none of ours."""
    login_id, word = _parts(token)
    genuine = token_of(key, login_id, word)
    return login_id if hmac.compare_digest(genuine.encode(), token.encode()) else None


def following(key: bytes, token: str) -> str:
    """The one token that follows this one, which nobody but us can tell.

    Were there two, a thief and the user could each go on with one of them, and neither would be missed.
    """
    login_id, word = _parts(token)
    return token_of(key, login_id, _digest(key, b"refresh token", f"{login_id}.{word}"))


def _parts(token: str) -> tuple[str, str]:
    login_id, _, rest = token.partition(".")
    return login_id, rest.rpartition(".")[0]


def _digest(key: bytes, purpose: bytes, text: str) -> str:
    digest = hmac.digest(key, purpose + b"\0" + text.encode(), hashlib.sha256)
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
