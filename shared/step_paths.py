"""The paths that a step may name: what it hands on, and what it keeps between builds.

The only file that knows how a pattern matches a path.
Paths are relative to the workspace, with `/` between segments; nothing here touches a disk.
"""

import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from shared.references import InvalidReference, refuse_unshowable

_LENGTH_LIMIT = 4096
_SEGMENT_LIMIT = 64
_ANY_DEPTH_LIMIT = 10
_SET_LIMIT = 100
_WORKSPACE = "/workspace"
_WILDCARDS = re.compile(r"[*?\[]")
_ENCODED_SEPARATOR = re.compile(r"%(?:25)*(?:2e|2f|5c|00)", re.IGNORECASE)
_SYSTEM_PLACES = frozenset(
    {"/proc", "/sys", "/dev", "/etc", "/usr", "/bin", "/sbin", "/run", "/var/run", "/buildmill"}
)


# What may be written


def output_pattern(text: str) -> str:
    """Accept a path or pattern of outputs and return it without `./` before and `/` behind it."""
    if text.startswith("/"):
        raise InvalidReference("an output path is relative to the workspace")
    segments = _canonical_segments(text, "an output path")
    if segments.count("**") > _ANY_DEPTH_LIMIT:
        raise InvalidReference(f"an output path holds at most {_ANY_DEPTH_LIMIT} times **")
    if text.count("[") > _SET_LIMIT:
        raise InvalidReference(f"an output path holds at most {_SET_LIMIT} sets in brackets")
    canonical = "/".join(
        segment for i, segment in enumerate(segments) if segment != "**" or segments[i - 1 : i] != ["**"]
    )
    _compile_pattern(canonical)
    return canonical


def is_pattern(text: str) -> bool:
    """Tell whether an output path may match more than the one place it names."""
    return _WILDCARDS.search(text) is not None


def cache_dir(text: str) -> str:
    """Accept a directory to keep between builds: in the workspace if relative, else in the container."""
    if is_pattern(text):
        raise InvalidReference("a cache directory is one place: * ? and [ are refused")
    is_absolute = text.startswith("/")
    segments = _canonical_segments(text.removeprefix("/"), "a cache directory")
    if not is_absolute:
        return "/".join(segments)
    path = "/" + "/".join(segments)
    if path == _WORKSPACE:
        raise InvalidReference("the workspace itself cannot be a cache directory")
    if path.startswith(f"{_WORKSPACE}/"):
        return cache_dir(path.removeprefix(f"{_WORKSPACE}/"))
    if segments[0].startswith("lib") or any(_is_within(path, place) for place in _SYSTEM_PLACES):
        raise InvalidReference(f"{path} belongs to the system of the container")
    return path


def _canonical_segments(text: str, what: str) -> list[str]:
    refuse_unshowable(what, text)
    if len(text.encode("utf-8")) > _LENGTH_LIMIT:
        raise InvalidReference(f"{what} is at most {_LENGTH_LIMIT} bytes long")
    if "\\" in text or _ENCODED_SEPARATOR.search(text):
        raise InvalidReference(f"{what} must not hold backslashes or encoded dots and slashes")
    text = text.removeprefix("./")
    if text.startswith("~"):
        raise InvalidReference(f"{what} must not start with ~: write out the directory it stands for")
    segments = text.removesuffix("/").split("/")
    # Compatibility forms of the dot are refused too: another system might fold them.
    folded = unicodedata.normalize("NFKC", text).removesuffix("/").split("/")
    if any(segment in ("", ".", "..") for segment in (*segments, *folded)):
        raise InvalidReference(f"{what} must not be empty nor hold empty, . or .. segments")
    if len(segments) > _SEGMENT_LIMIT:
        raise InvalidReference(f"{what} holds at most {_SEGMENT_LIMIT} segments")
    if segments[0].casefold() == ".git":
        raise InvalidReference(f"{what} must not lie in .git")
    return segments


# Matching


def matches(pattern: str, path: str) -> bool:
    """Tell whether a canonical pattern takes a canonical path.

    `*`, `?` and `[…]` stay within a segment and match dotfiles as well.
    `**` stands for any number of segments, at the end for at least one.
    A path without wildcards takes all that lies below it.  The workspace's own .git is never taken.
    """
    compiled = _compile_pattern(pattern)
    states = compiled.states_after(path.split("/"))
    return not _is_own_git(path) and bool(states >> len(compiled.segments))


def could_contain(pattern: str, directory: str) -> bool:
    """Tell whether a walk must enter a directory (`""` is the workspace) to find all that matches."""
    if directory in ("", "."):
        return True
    compiled = _compile_pattern(pattern)
    states = compiled.states_after(directory.split("/"))
    end = 1 << len(compiled.segments)
    return not _is_own_git(directory) and bool(states & (compiled.repeats | (end - 1)))


def overlaps(a: str, b: str) -> bool:
    """Tell whether two canonical cache directories, or one and an output path, lay claim to the same place.

    A pattern that starts with a wildcard sweeps the workspace and leaves caches out: it claims no place.
    """
    pattern, place = (a, b) if is_pattern(a) else (b, a)
    if not is_pattern(pattern):
        return _is_within(_in_container(a), _in_container(b)) or _is_within(
            _in_container(b), _in_container(a)
        )
    prefix = _literal_prefix(pattern)
    if not prefix or place.startswith("/"):
        return False
    if is_pattern(place):
        other = _literal_prefix(place)
        return bool(other) and (_is_within(prefix, other) or _is_within(other, prefix))
    return _is_within(prefix, place) or matches(pattern, place) or could_contain(pattern, place)


def _literal_prefix(pattern: str) -> str:
    segments = pattern.split("/")
    first_wild = next(i for i, segment in enumerate(segments) if is_pattern(segment))
    return "/".join(segments[:first_wild])


def _in_container(path: str) -> str:
    return path if path.startswith("/") else f"{_WORKSPACE}/{path}"


def _is_within(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}/")


def _is_own_git(path: str) -> bool:
    return _is_within(path, ".git")


# Both matchers follow every way through a pattern at once: bit i of a number says that the first i parts are
# used up.  One letter, or one segment, moves all bits together, so no pattern can make them go back.


@dataclass(frozen=True)
class _LetterSet:
    """What stands between [ and ]."""

    is_negated: bool
    letters: frozenset[str]
    ranges: frozenset[tuple[str, str]]

    def holds(self, letter: str) -> bool:
        is_named = letter in self.letters or any(low <= letter <= high for low, high in self.ranges)
        return is_named != self.is_negated


@dataclass(frozen=True)
class _Segment:
    """The letters of one segment of a pattern, each kind with the places where it stands."""

    length: int
    repeats: int  # where a `*` stands
    literals: dict[str, int]
    any_letter: int
    sets: dict[_LetterSet, int]

    def takes(self, name: str) -> bool:
        states = 1
        for letter in name:
            taken = states & (self.literals.get(letter, 0) | self.any_letter)
            for letters, places in self.sets.items():
                if states & places and letters.holds(letter):
                    taken |= states & places
            states = taken << 1 | states & self.repeats
            if not states:
                return False
        return bool(states >> self.length)


@dataclass(frozen=True)
class _Pattern:
    """The segments of a pattern."""

    segments: tuple[_Segment, ...]
    repeats: int  # where a `**` stands

    def states_after(self, names: list[str]) -> int:
        states = 1
        for name in names:
            taken = states & self.repeats
            for i, segment in enumerate(self.segments):
                if states >> i & 1 and segment.takes(name):
                    taken |= 2 << i
            states = taken
            if not states:
                return 0
        return states


@lru_cache(maxsize=1024)
def _compile_pattern(pattern: str) -> _Pattern:
    segments: list[_Segment] = []
    repeats = 0
    parts = pattern.split("/")
    if parts[-1] == "**":
        parts.append("*")  # at least one segment
    for part in parts:
        if part == "**":
            repeats |= 1 << len(segments)
        else:
            segments.append(_compile_segment(part))
    if not is_pattern(pattern):
        repeats |= 1 << len(segments)
    return _Pattern(tuple(segments), repeats)


def _compile_segment(text: str) -> _Segment:
    if "**" in text:
        raise InvalidReference("** stands for whole segments: write it between slashes")
    length = repeats = any_letter = 0
    literals: dict[str, int] = {}
    sets: dict[_LetterSet, int] = {}
    at = 0
    while at < len(text):
        letter, place = text[at], 1 << length
        at += 1
        if letter == "*":
            repeats |= place
            continue
        if letter == "?":
            any_letter |= place
        elif letter == "[":
            end = text.find("]", at)
            letters = _letter_set(text[at : max(at, end)])
            sets[letters] = sets.get(letters, 0) | place
            at = end + 1
        else:
            literals[letter] = literals.get(letter, 0) | place
        length += 1
    return _Segment(length, repeats, literals, any_letter, sets)


def _letter_set(text: str) -> _LetterSet:
    """Read a set such as `a-z_` or `!0-9`."""
    is_negated = text.startswith(("!", "^"))
    named = text[1:] if is_negated else text
    if not named or "[" in named:
        raise InvalidReference("[ in an output path needs letters and a ] in the same segment")
    letters: set[str] = set()
    ranges: set[tuple[str, str]] = set()
    at = 0
    while at < len(named):
        if named[at + 1 : at + 2] == "-" and at + 2 < len(named):
            if named[at] > named[at + 2]:
                raise InvalidReference(f"the range {named[at : at + 3]} in an output path is empty")
            ranges.add((named[at], named[at + 2]))
            at += 3
        else:
            letters.add(named[at])
            at += 1
    return _LetterSet(is_negated, frozenset(letters), frozenset(ranges))
