"""Takes secrets out of a stream of bytes, however the stream is cut.

A byte is covered when it lies inside any occurrence of any needle. Every run of covered bytes becomes
one `***`. The result depends on the stream alone, never on the chunks it came in: bytes that may still
turn out to be the beginning of a needle are held back until that is decided, however long it takes.
"""

import base64
import bisect
import json
import string
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence

from ahocorasick_rs import BytesAhoCorasick, Implementation, MatchKind

REPLACEMENT = b"***"
SHORTEST_NEEDLE = 4
# Longer secrets are cut into needles of this length, so that little is ever held back.
LONGEST_NEEDLE = 1024
LONG_SECRET = 4096
SLICE_BYTES = 256 * 1024
MANY_RUNS = 256  # in one slice; looking at it whole is quicker then
LARGEST_DFA = 32 * 1024  # bytes of needles; the automaton takes some hundred times that

BARE_IN_SHELL = frozenset(string.ascii_letters.encode() + string.digits.encode() + b"%+,-./:=@_")
BARE_IN_SHELL |= frozenset(range(128, 256))
DOLLAR_ESCAPES = {code: b"\\%03o" % code for code in (*range(32), 127)} | {
    7: b"\\a", 8: b"\\b", 9: b"\\t", 10: b"\\n", 11: b"\\v", 12: b"\\f", 13: b"\\r", 27: b"\\E",
    39: b"\\'", 92: b"\\\\",
}  # fmt: skip

Finder = BytesAhoCorasick


class Masker:
    """Masks one stream; `fresh()` gives another that starts from the beginning, cheaply."""

    replacement = REPLACEMENT

    def __init__(self, needles: Iterable[bytes]) -> None:
        wanted = {needle for needle in needles if len(needle) >= SHORTEST_NEEDLE}
        self._needles = sorted(_without_implied(wanted))
        self._longest = max(map(len, self._needles), default=0)
        if self._needles:
            fast = Implementation.DFA if sum(map(len, self._needles)) <= LARGEST_DFA else None
            self._any = Finder(self._needles, matchkind=MatchKind.LeftmostFirst, implementation=fast)
            self._all = Finder(self._needles)
            self._heads = Finder(sorted({needle[:SHORTEST_NEEDLE] for needle in self._needles}))
            self._short_heads = {needle[:n] for needle in self._needles for n in range(1, SHORTEST_NEEDLE)}
        self._held = b""
        self._covered = 0  # so many bytes at the start of `_held` are known to be covered
        self._inside = False  # the last byte given out stands for a covered one

    def fresh(self) -> "Masker":
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._held, other._covered, other._inside = b"", 0, False
        return other

    @property
    def hold_back(self) -> int:
        """How many bytes wait for what follows them."""
        return len(self._held)

    @property
    def at_rest(self) -> bool:
        """True when a fresh masker would go on from here exactly as this one does."""
        return not self._held and not self._inside

    def feed(self, chunk: bytes) -> bytes:
        """The masked stream as far as `chunk` decides it."""
        if not self._needles:
            return chunk
        if len(chunk) <= SLICE_BYTES:
            return self._feed_slice(chunk)
        view = memoryview(chunk)
        return b"".join(
            self._feed_slice(bytes(view[start : start + SLICE_BYTES]))
            for start in range(0, len(chunk), SLICE_BYTES)
        )

    def finish(self) -> bytes:
        """What is still held back, now that nothing follows; the masker starts anew after it."""
        rest = self._give_out(self._held, self._cover(self._held) if self._held else [])
        self._held, self._covered, self._inside = b"", 0, False
        return rest

    def _feed_slice(self, chunk: bytes) -> bytes:
        stream = self._held + chunk if self._held else chunk
        covered = self._cover(stream)
        cut = len(stream) - self._pending(stream)
        masked = self._give_out(stream[:cut] if cut < len(stream) else stream, covered)
        self._held = stream[cut:]
        # A covered run may reach into what is held back, where it is not found a second time.
        self._covered = next((end - cut for start, end in reversed(covered) if start <= cut < end), 0)
        return masked

    def _cover(self, stream: bytes) -> list[tuple[int, int]]:
        """The covered runs of `stream`, sorted and disjoint."""
        known = [(0, self._covered)] if self._covered else []
        chosen = self._any.find_matches_as_indexes(stream)
        if not chosen:
            return known
        runs = _merge((start, end) for _, start, end in chosen)
        if len(runs) > MANY_RUNS:
            return _merge(sorted(known + self._occurrences(stream, 0, len(stream))))
        # The leftmost search skips only what begins inside a run: look again where the runs end.
        beyond = [
            found
            for _, end in runs
            for found in self._occurrences(stream, max(0, end - self._longest), end + self._longest)
        ]
        return _merge(sorted(known + runs + beyond))

    def _occurrences(self, stream: bytes, start: int, end: int) -> list[tuple[int, int]]:
        found = self._all.find_matches_as_indexes(stream[start:end], overlapping=True)
        return [(start + first, start + last) for _, first, last in found]

    def _pending(self, stream: bytes) -> int:
        """The length of the longest end of `stream` with which a needle begins but does not end."""
        tail = stream[-(self._longest - 1) :]
        for _, start, _ in self._heads.find_matches_as_indexes(tail, overlapping=True):
            if self._begins_a_longer_needle(tail[start:]):
                return len(tail) - start
        for length in range(min(SHORTEST_NEEDLE - 1, len(tail)), 0, -1):
            if tail[-length:] in self._short_heads:
                return length
        return 0

    def _begins_a_longer_needle(self, end: bytes) -> bool:
        place = bisect.bisect_right(self._needles, end)  # the first needle that sorts behind `end`
        return place < len(self._needles) and self._needles[place].startswith(end)

    def _give_out(self, stream: bytes, covered: Sequence[tuple[int, int]]) -> bytes:
        if not stream:
            return b""
        pieces: list[bytes] = []
        place = 0
        for start, end in covered:
            if start >= len(stream) or end <= start:
                continue
            if start > place:
                pieces.append(stream[place:start])
                self._inside = False
            if not self._inside:
                pieces.append(REPLACEMENT)
                self._inside = True
            place = min(end, len(stream))
        if place < len(stream):
            pieces.append(stream[place:] if place else stream)
            self._inside = False
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def needles_for(secret: bytes) -> list[bytes]:
    """The spellings in which a secret is looked for; none for one too short to be masked.

    As it is, each of its lines, in base64 (wherever it begins in the encoded text, both alphabets, with
    and without padding, wrapped at 64 or 76), hexadecimal, percent-encoded, as a JSON string, quoted
    for a shell, and all that with the other kind of line ends. Beyond 4 KiB the rarer ones are left out:
    what is percent-encoded, quoted for a shell, or encoded with other line ends.
    """
    if len(secret.strip()) < SHORTEST_NEEDLE:
        return []
    lf = secret.replace(b"\r\n", b"\n")
    whole = {secret, lf, lf.replace(b"\n", b"\r\n")}
    whole |= {text.strip(b"\r\n") for text in whole}
    needles = whole | {line.strip() for line in lf.split(b"\n")}
    if len(secret) > LONG_SECRET:
        needles |= _often_encoded(secret)
    else:
        for text in whole:
            needles |= _often_encoded(text) | _url_forms(text) | _shell_forms(text)
    return sorted({p for needle in needles if len(needle) >= SHORTEST_NEEDLE for p in _pieces(needle)})


def plan_masking(secrets: Mapping[str, bytes]) -> tuple[list[bytes], list[str]]:
    """The needles of all secrets, and one warning for each secret that cannot be masked."""
    needles: set[bytes] = set()
    warnings = []
    for name, secret in sorted(secrets.items()):
        found = needles_for(secret)
        needles.update(found)
        if not found:
            warnings.append(
                f"secret {name} is shorter than {SHORTEST_NEEDLE} bytes and is not masked in the log"
            )
    return sorted(needles), warnings


def _often_encoded(text: bytes) -> set[bytes]:
    forms = {text.hex().encode(), text.hex().upper().encode()}
    for shift in range(3):
        forms |= _base64_forms(text, shift)
    try:
        spelled = text.decode()
    except UnicodeDecodeError:
        return forms  # JSON cannot say it
    for ascii_only in (True, False):
        quoted = json.dumps(spelled, ensure_ascii=ascii_only)[1:-1]
        forms |= {quoted.encode(), quoted.replace("/", "\\/").encode()}
    return forms


def _base64_forms(text: bytes, shift: int) -> set[bytes]:
    """The text inside a longer base64 text, `shift` bytes behind a boundary of three."""
    padded = base64.b64encode(b"\0" * shift + text)
    start = (shift * 8 + 5) // 6  # what the bytes before it have a share in
    sure = (shift + len(text)) * 8 // 6  # what the bytes behind it have no share in
    forms = {padded[start:sure], padded[start:].rstrip(b"="), padded[start:]}
    if shift == 0:
        for width in (64, 76):
            lines = [padded[place : place + width] for place in range(0, len(padded), width)]
            if len(lines) > 1:
                # The lines of a long text cover it; what is left is the last one, which may be too short.
                joined = lines if len(text) <= LONG_SECRET else lines[-2:]
                forms |= {b"\n".join(joined), b"\r\n".join(joined), *lines[:-1]}
    return forms | {form.translate(bytes.maketrans(b"+/", b"-_")) for form in forms}


def _url_forms(text: bytes) -> set[bytes]:
    forms: set[bytes] = set()
    for safe in ("", "/", "!'()*~", "!'()*~/"):  # the last two as browsers spell it
        strict = urllib.parse.quote(text, safe=safe)
        for form in (strict, strict.replace("%20", "+")):
            forms |= {form.encode(), _lower_escapes(form).encode()}
    return forms


def _lower_escapes(quoted: str) -> str:
    first, *rest = quoted.split("%")
    return "%".join([first, *(part[:2].lower() + part[2:] for part in rest)])


def _shell_forms(text: bytes) -> set[bytes]:
    """Inside '...' in its two spellings, inside "...", with backslashes, and inside $'...'."""
    double = text
    for special in (b"\\", b'"', b"$", b"`"):
        double = double.replace(special, b"\\" + special)
    bare = b"".join(bytes([c]) if c in BARE_IN_SHELL else b"\\%c" % c for c in text)
    dollar = b"".join(DOLLAR_ESCAPES.get(c, bytes([c])) for c in text)
    return {text.replace(b"'", b"'\\''"), text.replace(b"'", b"'\"'\"'"), double, bare, dollar}


def _pieces(needle: bytes) -> list[bytes]:
    if len(needle) <= LONGEST_NEEDLE:
        return [needle]
    starts = [*range(0, len(needle) - LONGEST_NEEDLE, LONGEST_NEEDLE), len(needle) - LONGEST_NEEDLE]
    return [needle[start : start + LONGEST_NEEDLE] for start in starts]


def _without_implied(needles: set[bytes]) -> list[bytes]:
    """Leave out each needle that shorter ones cover from end to end anyway.

    This changes no result. It keeps families like `aaaa`, `aaaaa`, ... from matching a thousandfold.
    """
    kept: list[bytes] = []
    shorter: Finder | None = None
    next_length = 0
    for needle in sorted(needles, key=len):
        if len(needle) >= next_length:
            shorter = Finder(kept) if kept else None
            next_length = len(needle) + max(1, len(needle) // 4)
        if not (shorter and _covers(shorter, needle)):
            kept.append(needle)
    return kept


def _covers(finder: Finder, needle: bytes) -> bool:
    found = finder.find_matches_as_indexes(needle, overlapping=True)
    return _merge(sorted((start, end) for _, start, end in found)) == [(0, len(needle))]


def _merge(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join what overlaps or touches; `intervals` come sorted."""
    merged: list[tuple[int, int]] = []
    for start, end in intervals:
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged
