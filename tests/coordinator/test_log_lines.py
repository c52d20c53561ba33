"""The bytes of a log are cut into the same lines, however they arrive."""

import random

import pytest

from coordinator.rules.log_lines import (
    BEGINNING,
    LONGEST_PART,
    Level,
    Line,
    LineCutter,
    Position,
    behind,
    position_in,
)


def lines_of(*pieces: bytes) -> list[Line]:
    cutter = LineCutter()
    found = [line for piece in pieces for line in cutter.cut(piece)]
    return [*found, *cutter.flush()]


def texts_of(*pieces: bytes) -> list[bytes]:
    return [line.text for line in lines_of(*pieces)]


def test_each_newline_ends_a_line_and_what_is_left_is_one_when_it_is_flushed() -> None:
    assert texts_of(b"one\ntwo\n\nthree") == [b"one", b"two", b"", b"three"]
    assert texts_of(b"one\n") == [b"one"]
    assert texts_of(b"") == []


def test_a_line_may_come_in_any_number_of_pieces() -> None:
    assert texts_of(b"o", b"", b"ne\nt", b"wo", b"\n") == [b"one", b"two"]


def test_a_line_as_long_as_a_message_may_be_is_one() -> None:
    longest = b"x" * LONGEST_PART

    assert lines_of(longest + b"\n") == [Line(longest, Level.INFO)]


def test_a_longer_line_comes_in_parts_that_say_that_more_follows() -> None:
    parts = lines_of(b"x" * (2 * LONGEST_PART + 1) + b"\nnext\n")

    assert [(len(part.text), part.is_partial) for part in parts] == [
        (LONGEST_PART, True),
        (LONGEST_PART, True),
        (1, False),
        (4, False),
    ]


def test_a_part_ends_between_two_characters() -> None:
    parts = texts_of(b"x" * (LONGEST_PART - 1) + "ü".encode() * 10)

    assert [part.decode() for part in parts] == ["x" * (LONGEST_PART - 1), "ü" * 10]


def test_bytes_that_are_no_characters_are_cut_all_the_same() -> None:
    assert [len(part) for part in texts_of(b"\x80" * (LONGEST_PART + 5))] == [LONGEST_PART, 5]


def test_the_cuts_do_not_depend_on_how_the_bytes_arrive() -> None:
    dice = random.Random(7)
    words = [b"\n", b"short", "ü€🙂".encode(), b"\xff\x80\x80", b"y" * 30_000, b"z" * 70_000]
    text = b"".join(dice.choice(words) for _ in range(200))
    whole = lines_of(text)

    for _ in range(20):
        cuts = sorted(dice.sample(range(len(text)), 50))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert lines_of(*pieces) == whole
    assert b"".join(line.text if line.is_partial else line.text + b"\n" for line in whole)[
        :-1
    ] == text.removesuffix(b"\n")


@pytest.mark.parametrize(
    ("text", "level"),
    [
        (b"[buildmill] pulled the image", Level.INFO),
        (b"[buildmill] warning: the cache is gone", Level.WARN),
        (b"[buildmill] error: bytes are missing", Level.ERROR),
        (b"error: what a step says is information", Level.INFO),
        (b"", Level.INFO),
    ],
)
def test_our_own_lines_say_how_grave_they_are(text: bytes, level: Level) -> None:
    assert lines_of(text + b"\n") == [Line(text, level)]


def test_all_parts_of_a_line_have_the_level_of_its_beginning() -> None:
    parts = lines_of(b"[buildmill] error: " + b"x" * LONGEST_PART + b"\nnext\n")

    assert [part.level for part in parts] == [Level.ERROR, Level.ERROR, Level.INFO]


def test_a_position_can_be_written_and_read() -> None:
    assert position_in(str(Position(12, 3))) == Position(12, 3)
    assert position_in("0") == BEGINNING
    assert [
        position_in(text) for text in ("", "1", "1.", ".1", "1.2.3", "-1.2", "1.x", "٣.1", "9" * 19 + ".1")
    ] == [None] * 9
    assert Position(1, 2) < Position(1, 10) < behind(1) < Position(2, 1)
