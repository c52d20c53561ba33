"""Turns the bytes of a body or a query string into values; refuses what two readers could read differently.

JSON as it is commonly parsed keeps the last of two equal keys, knows NaN, and accepts numbers and strings
that no database column can hold. Here all of these are refused at the door, before any model sees them.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from math import isfinite
from urllib.parse import unquote_to_bytes

INT64_MIN = -(2**63)
INT64_MAX = 2**63 - 1
DIGITS_OF_INT64 = 19
LONGEST_QUERY = 8 * 1024
MOST_PARAMETERS = 64
LONGEST_SHOWN_NAME = 64

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
# Numbers that deserve a closer look: may leave int64, may overflow to infinity, minus zero.
_UNUSUAL_NUMBER = re.compile(rb"[0-9]{19}|[0-9][eE]|-0(?![0-9.])")
# Seen, these may still be harmless (a pair of surrogates, an escaped backslash); unseen, all text is sound.
_UNUSUAL_ESCAPE = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_NOT_AN_ESCAPE = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class BadJson(ValueError):
    """A body or a query string that nobody may act on; names the place where it is known."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class _RepeatedKey(ValueError):
    """Internal: an object with one key twice, whose place is not known yet."""


class _Repeating(dict[str, object]):
    """Internal: stands where an object with a repeated key stood, so that its place can be found."""

    repeated: str


def parse(
    body: bytes, *, max_depth: int = 64, max_nodes: int = 200_000, max_digits: int = DIGITS_OF_INT64
) -> object:
    """The value that a JSON body says, if it says exactly one."""
    if body.startswith(b"\xef\xbb\xbf"):
        raise BadJson("body", "starts with a byte order mark")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadJson("body", f"is not UTF-8 at byte {error.start}") from None
    outside = _outside_strings(body)
    _check_size(outside, max_depth, max_nodes)
    value = _decode(text, _decoder_for(outside, max_digits))
    if _UNUSUAL_ESCAPE.search(body) is not None:
        _check_texts(value)
    return value


def check_text(value: str) -> str | None:
    """Why a text can be neither stored nor sent on, or None when it can."""
    if "\x00" in value:
        return "contains a NUL character"
    if value.isascii():
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return "contains half of a surrogate pair"
    return None


def parse_query(raw: bytes) -> dict[str, str]:
    """The parameters of a query string, each of them given once."""
    if len(raw) > LONGEST_QUERY:
        raise BadJson("query", f"is longer than {LONGEST_QUERY} bytes")
    pairs = [pair for pair in raw.split(b"&") if pair]
    if len(pairs) > MOST_PARAMETERS:
        raise BadJson("query", f"has more than {MOST_PARAMETERS} parameters")
    parameters: dict[str, str] = {}
    for pair in pairs:
        raw_name, _, raw_value = pair.partition(b"=")
        name = _unquote(raw_name, "query")
        value = _unquote(raw_value, _shown(name))
        if name in parameters:
            raise BadJson(_shown(name), "is given more than once")
        parameters[name] = value
    return parameters


def _outside_strings(body: bytes) -> bytes:
    """The body without what its strings contain.

    Only used to measure: a body for which this goes wrong (a backslash or a lone quote between values) is not
    JSON, and the parser stops at that very place.
    """
    if b"\\" in body:
        body = _ESCAPE.sub(b"", body)
    return b"".join(body.split(b'"')[::2])


def _check_size(outside: bytes, max_depth: int, max_nodes: int) -> None:
    """Refuse what would cost too much to parse, before it is parsed."""
    opened = outside.count(b"[") + outside.count(b"{")
    if 1 + opened + outside.count(b",") > max_nodes:
        raise BadJson("body", f"has more than {max_nodes} values")
    if opened <= max_depth:
        return
    depth = 0
    for bracket in re.findall(rb"[\[\]{}]", outside):
        depth += 1 if bracket in b"[{" else -1
        if depth > max_depth:
            raise BadJson("body", f"is nested deeper than {max_depth} levels")
        if depth < 0:
            raise BadJson("body", "closes a bracket that it did not open")


def _decoder_for(outside: bytes, max_digits: int) -> json.JSONDecoder:
    """The plain decoder, which stays in C for numbers, unless some number needs a look of its own."""
    if _UNUSUAL_NUMBER.search(outside) is None and max_digits >= DIGITS_OF_INT64:
        return _PLAIN
    if re.search(rb"[0-9]{%d}" % (max_digits + 1), outside) is not None:
        # Before int() sees it: that takes quadratic time in the number of digits.
        raise BadJson("body", f"has a number of more than {max_digits} digits")
    return _CAREFUL


def _decode(text: str, decoder: json.JSONDecoder) -> object:
    try:
        value: object = decoder.decode(text)
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:].removesuffix(" at")
        raise BadJson("body", f"is not JSON at character {error.pos}: {reason}") from None
    except _RepeatedKey:
        raise BadJson(_find_repeated_key(_decode(text, _MARKING)), "is given more than once") from None
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RepeatedKey
    return found


def _mark_repeated(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    marked = _Repeating(pairs)
    counts = Counter(key for key, _ in pairs)
    marked.repeated = next(key for key, times in counts.items() if times > 1)
    return marked


def _refuse_constant(name: str) -> object:
    raise BadJson("body", f"{name} is not a JSON number")


def _read_integer(digits: str) -> int:
    number = int(digits)
    if not INT64_MIN <= number <= INT64_MAX:
        raise BadJson("body", f"the integer {digits} does not fit into 64 bits")
    if number == 0 and digits.startswith("-"):
        raise BadJson("body", "minus zero is not an integer")
    return number


def _read_float(digits: str) -> float:
    number = float(digits)
    if not isfinite(number):
        raise BadJson("body", f"the number {digits} is out of range")
    return number


def _decoder(
    object_pairs_hook: Callable[[list[tuple[str, object]]], dict[str, object]], *, careful: bool
) -> json.JSONDecoder:
    return json.JSONDecoder(
        object_pairs_hook=object_pairs_hook,
        parse_constant=_refuse_constant,
        parse_int=_read_integer if careful else None,
        parse_float=_read_float if careful else None,
    )


_PLAIN = _decoder(_unique, careful=False)
_CAREFUL = _decoder(_unique, careful=True)
_MARKING = _decoder(_mark_repeated, careful=False)


def _find_repeated_key(value: object) -> str:
    for path, found in _walk(value, ""):
        if isinstance(found, _Repeating):
            return _member(path, found.repeated)
    raise AssertionError("the second reading did not find the repeated key")


def _check_texts(value: object) -> None:
    for path, found in _walk(value, ""):
        if isinstance(found, str) and (reason := check_text(found)) is not None:
            raise BadJson(path or "body", reason)
        if isinstance(found, dict):
            for key in found:
                if (reason := check_text(key)) is not None:
                    raise BadJson(_member(path, key), f"as a key {reason}")


def _walk(value: object, path: str) -> Iterator[tuple[str, object]]:
    """Every value with its path, outer values first; as deep as parsing has allowed."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _walk(inner, _member(path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _walk(inner, f"{path or 'body'}[{index}]")


def _member(path: str, key: str) -> str:
    if _PLAIN_NAME.fullmatch(key) is None:
        return f'{path or "body"}["{_shown(key)}"]'
    return f"{path}.{key[:LONGEST_SHOWN_NAME]}" if path else key[:LONGEST_SHOWN_NAME]


def _shown(name: str) -> str:
    """A name from outside, fit to stand in a message."""
    readable = name if name.isprintable() else ascii(name)[1:-1]
    return readable[:LONGEST_SHOWN_NAME]


def _unquote(quoted: bytes, path: str) -> str:
    if not quoted.isascii():
        raise BadJson(path, "contains a byte that is not percent-encoded")
    if _NOT_AN_ESCAPE.search(quoted) is not None:
        raise BadJson(path, "contains a percent sign that is not followed by two hex digits")
    try:
        text = unquote_to_bytes(quoted.replace(b"+", b" ")).decode("utf-8")
    except UnicodeDecodeError:
        raise BadJson(path, "is not UTF-8") from None
    if (reason := check_text(text)) is not None:
        raise BadJson(path, reason)
    return text
