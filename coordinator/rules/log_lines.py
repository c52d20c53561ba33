"""Cuts the log of a build into messages, the same ones for everybody who reads it, whenever and from where.

The log is a sequence of pieces, each of one attempt of a step. A message belongs to the piece that brought
its last byte, and is numbered within it; so its position says exactly which messages stand in front of it,
however pieces of several steps alternate and however many of them one line spans.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

LONGEST_PART = 64 * 1024
# Behind the last message of a piece, whatever its number is.
_LAST = 2**62
_POSITION = re.compile(r"([0-9]{1,18})\.([0-9]{1,18})")
_CONTINUATION = range(0x80, 0xC0)


class Level(StrEnum):
    """How grave a message is: ours by its word, all that steps say is information."""

    INFO = "INFO"
    WARN = "WARN"
    ERROR = "ERROR"


_WORDS = {b"[buildmill] error:": Level.ERROR, b"[buildmill] warning:": Level.WARN}


@dataclass(frozen=True, order=True)
class Position:
    """A place in the log of a build: the message with this number within this piece."""

    piece: int
    number: int

    def __str__(self) -> str:
        return f"{self.piece}.{self.number}"


BEGINNING = Position(0, 0)


def behind(piece: int) -> Position:
    """The place between this piece and the next."""
    return Position(piece, _LAST)


def position_in(text: str) -> Position | None:
    """The position that is written like this; "0" is the beginning."""
    if text == "0":
        return BEGINNING
    found = _POSITION.fullmatch(text)
    return Position(int(found[1]), int(found[2])) if found is not None else None


@dataclass(frozen=True)
class Line:
    """A line without its end, or a part of one that is too long: `is_partial` while more of it follows."""

    text: bytes
    level: Level
    is_partial: bool = False


class LineCutter:
    """Cuts what one attempt writes. It cuts at the same places, however the bytes are handed in."""

    def __init__(self) -> None:
        self._open = b""
        self._level: Level | None = None

    def cut(self, data: bytes) -> Iterator[Line]:
        """Every line that these bytes end, and every part that they fill."""
        *ended, rest = data.split(b"\n")
        for text in ended:
            yield from self._fill(text)
            yield from self.flush(is_empty_one=True)
        yield from self._fill(rest)

    def flush(self, *, is_empty_one: bool = False) -> Iterator[Line]:
        """What no newline has ended; nothing where nothing stands open, unless an empty line is one."""
        if self._open or is_empty_one:
            yield Line(self._open, self._level or level_of(self._open))
        self._open, self._level = b"", None

    def _fill(self, text: bytes) -> Iterator[Line]:
        self._open = self._open + text if self._open else text
        while len(self._open) > LONGEST_PART:
            self._level = self._level or level_of(self._open)
            end = _end_of_part(self._open)
            yield Line(self._open[:end], self._level, is_partial=True)
            self._open = self._open[end:]


def level_of(text: bytes) -> Level:
    """What the first word of a line says."""
    return next((level for word, level in _WORDS.items() if text.startswith(word)), Level.INFO)


def _end_of_part(text: bytes) -> int:
    """As many bytes as a part may have, without the beginning of a character that goes on behind them."""
    end = LONGEST_PART
    while end > LONGEST_PART - 3 and text[end] in _CONTINUATION:
        end -= 1
    return end if text[end] not in _CONTINUATION else LONGEST_PART
