"""Secrets leave the stream whatever it is cut into."""

import base64
import itertools
import json
import random
import shlex
import subprocess
import time
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.mask import LONGEST_NEEDLE, Masker, needles_for, plan_masking

SECRET = b"s3cr3t/+ 'Zz$\"9"


def masked_whole(stream: bytes, needles: list[bytes]) -> bytes:
    """The definition, the slow way: every covered run becomes one replacement."""
    covered = bytearray(len(stream))
    for needle in needles:
        start = stream.find(needle)
        while start >= 0:
            covered[start : start + len(needle)] = b"\1" * len(needle)
            start = stream.find(needle, start + 1)
    out = bytearray()
    for place, byte in enumerate(stream):
        if not covered[place]:
            out.append(byte)
        elif place == 0 or not covered[place - 1]:
            out += b"***"
    return bytes(out)


def masked_in_pieces(stream: bytes, needles: list[bytes], cuts: list[int]) -> bytes:
    masker = Masker(needles)
    edges = [0, *sorted(cuts), len(stream)]
    out = [masker.feed(stream[a:b]) for a, b in itertools.pairwise(edges)]
    return b"".join([*out, masker.finish()])


def in_log(printed: bytes, secret: bytes = SECRET) -> bytes:
    masker = Masker(needles_for(secret))
    return masker.feed(printed) + masker.finish()


@pytest.mark.threat("G01")
def test_a_secret_is_masked_at_every_split_position():
    needles = needles_for(SECRET)
    stream = b"before " + SECRET + SECRET[:5] + b" and " + SECRET + b" after\n"
    whole = masked_whole(stream, needles)

    answers = {masked_in_pieces(stream, needles, [cut]) for cut in range(len(stream))}
    answers.add(masked_in_pieces(stream, needles, list(range(len(stream)))))

    assert answers == {whole}
    assert whole == b"before ***" + SECRET[:5] + b" and *** after\n"


@pytest.mark.threat("G01")
@given(st.data())
def test_any_cut_gives_what_the_whole_stream_gives(data):
    alphabet = st.sampled_from(b"ab")
    text = st.lists(alphabet, max_size=60).map(bytes)
    needles = data.draw(st.lists(st.lists(alphabet, min_size=4, max_size=9).map(bytes), max_size=4))
    stream = data.draw(text)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))

    answer = masked_in_pieces(stream, needles, cuts)

    assert answer == masked_whole(stream, needles)


@pytest.mark.threat("G01")
def test_needles_which_overlap_themselves_give_the_same_for_every_cut():
    chance = random.Random(7)
    for _ in range(4000):
        letters = b"ab" if chance.random() < 0.7 else b"abc"
        needles = [
            bytes(chance.choices(letters, k=chance.randint(4, 12))) for _ in range(chance.randint(1, 6))
        ]
        parts = [chance.choice(needles)[: chance.randint(1, 12)] for _ in range(chance.randint(1, 12))]
        stream = b"".join(parts) + bytes(chance.choices(letters, k=chance.randint(0, 20)))
        cuts = [chance.randint(0, len(stream)) for _ in range(chance.randint(0, 10))]

        assert masked_in_pieces(stream, needles, cuts) == masked_whole(stream, needles), (
            needles,
            stream,
            cuts,
        )


@pytest.mark.threat("G01")
@pytest.mark.parametrize("gap", [3, 40, 5000])
def test_few_and_many_secrets_in_one_slice_are_masked_alike(gap):
    chance = random.Random(gap)
    needles = [b"abab", b"ababcbab", b"babacc"]
    parts: list[bytes] = []
    while sum(map(len, parts[-1000:])) < 300_000 and len(parts) < 20_000:
        parts += [b"xyz"[:1] * chance.randint(1, gap), chance.choice(needles), chance.choice(needles)[:5]]
    stream = b"".join(parts)
    cuts = [chance.randrange(len(stream)) for _ in range(5)]

    assert masked_in_pieces(stream, needles, cuts) == masked_whole(stream, needles)


def test_a_covered_run_may_reach_into_what_is_held_back():
    needles = [b"abcdab", b"abxxyy"]
    masker = Masker(needles)

    first = masker.feed(b"-abcdab")  # `ab` is covered, yet may begin the other needle
    held = masker.hold_back
    rest = masker.feed(b"xx") + masker.feed(b"zz") + masker.finish()

    assert (first, held) == (b"-***", 2)
    assert first + rest == b"-***xxzz" == masked_whole(b"-abcdabxxzz", needles)


def test_at_rest_means_that_a_fresh_masker_goes_on_alike():
    needles = [b"aaaa", b"abab"]
    chance = random.Random(3)
    rests = 0
    for _ in range(500):
        stream = bytes(chance.choices(b"abc", k=40))
        masker = Masker(needles)
        cut = chance.randint(0, 40)
        head = masker.feed(stream[:cut])
        if masker.at_rest:
            rests += 1
            fresh = masker.fresh()
            assert head + fresh.feed(stream[cut:]) + fresh.finish() == masked_whole(stream, needles)
    assert rests > 50


def test_right_behind_a_secret_a_masker_is_not_at_rest():
    masker = Masker([b"abcd"])
    masker.feed(b"abcd")

    assert masker.hold_back == 0
    assert not masker.at_rest  # a fresh one would show a second replacement for what follows
    assert masker.feed(b"abcd.") == b"."
    assert masker.at_rest


def test_without_secrets_the_bytes_pass_untouched():
    masker = Masker([])
    chunk = bytes(range(256)) * 4

    passed = masker.feed(chunk)

    assert passed is chunk
    assert masker.hold_back == 0
    assert masker.finish() == b""


@pytest.mark.threat("G02")
def test_a_secret_of_many_lines_is_masked_whole_line_by_line_indented_and_with_other_line_ends():
    pem = b"-----BEGIN KEY-----\nMIIEowIBAAKCAQEA75\nqqqqwwwweeeerrrr\n-----END KEY-----\n"
    lines = pem.split(b"\n")

    for printed in (
        pem,
        pem.replace(b"\n", b"\r\n"),
        b"".join(b"    " + line + b"\n" for line in lines),
        b"\n\n".join(lines),
    ):
        shown = in_log(printed, pem)
        assert not any(line and line in shown for line in lines), shown


@pytest.mark.threat("G03")
@pytest.mark.parametrize("before", [b"", b"u", b"us", b"use"])
@pytest.mark.parametrize("behind", [b"", b"\n", b":x", b"abc"])
def test_base64_is_masked_at_every_alignment(before, behind):
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        encoded = encode(before + SECRET + behind)
        for printed in (encoded, encoded.rstrip(b"=")):
            shown = in_log(printed)
            # The characters at the seams hold bits of the neighbours, too, and may stay.
            at_most_before = -(-len(before) * 8 // 6)
            at_most_behind = len(printed) - (len(before) + len(SECRET)) * 8 // 6
            head, tail = shown.split(b"***")
            assert len(head) <= at_most_before
            assert len(tail) <= at_most_behind


@pytest.mark.threat("G03")
def test_wrapped_base64_is_masked():
    secret = random.Random(1).randbytes(200)
    encoded = base64.b64encode(secret)

    for width in (64, 76):
        wrapped = b"\n".join(encoded[i : i + width] for i in range(0, len(encoded), width)) + b"\n"
        assert in_log(wrapped, secret) == b"***\n"


@pytest.mark.threat("G03")
def test_the_documented_spellings_are_masked():
    text = SECRET.decode()
    spellings = {
        "hex": SECRET.hex(),
        "HEX": SECRET.hex().upper(),
        "url": urllib.parse.quote(text, safe=""),
        "path": urllib.parse.quote(text),
        "form": urllib.parse.quote_plus(text),
        "url with lower escapes": "s3cr3t%2f%2b%20%27Zz%24%229",
        "json": json.dumps(text)[1:-1],
        "json with slashes": json.dumps(text)[1:-1].replace("/", "\\/"),
        "shlex": shlex.quote(text)[1:-1],
        "printf %q": subprocess.run(
            ["bash", "-c", 'printf %q "$1"', "_", text], capture_output=True, text=True, check=True
        ).stdout,
        "xtrace": text.replace("'", "'\\''"),
    }

    shown = {name: in_log(b"<" + spelled.encode() + b">") for name, spelled in spellings.items()}

    assert shown == dict.fromkeys(spellings, b"<***>")


@pytest.mark.threat("G03")
def test_what_bash_quotes_with_a_dollar_is_masked():
    secret = b"one'two\nthree\tfour\x01five"
    quoted = subprocess.run(
        ["bash", "-c", 'printf %q "$1"', "_", secret.decode()], capture_output=True, check=True
    ).stdout
    assert quoted.startswith(b"$'")

    assert in_log(quoted, secret) == b"$'***'"


@pytest.mark.threat("G04")
def test_what_is_not_masked_is_known():
    for printed in (
        SECRET[::-1],
        b" ".join(SECRET[i : i + 1] for i in range(len(SECRET))),
        base64.b64encode(base64.b64encode(SECRET)),
    ):
        assert in_log(printed) == printed


@pytest.mark.threat("G05")
def test_short_secrets_are_not_masked_and_named_in_a_warning():
    secrets = {"A": b"a", "B": b"12", "EMPTY": b"", "LINES": b"\n\n\n\n\n", "GOOD": b"longenough"}

    needles, warnings = plan_masking(secrets)

    assert [warning.split()[1] for warning in warnings] == ["A", "B", "EMPTY", "LINES"]
    assert min(map(len, needles)) >= 4
    assert Masker([b"a", b"12"]).feed(b"banana 12") == b"banana 12"


@pytest.mark.threat("G05")
def test_a_secret_inside_another_leaves_nothing_of_the_longer_one():
    needles = [b"pass", b"mypassword"]

    assert masked_in_pieces(b"=mypassword= =pass=", needles, [4]) == b"=***= =***="


@pytest.mark.threat("G06")
def test_secrets_of_any_bytes_are_masked():
    for secret in (b".*[a-z]+(?:x)", b"nul\0inside", b"\xff\xfe\x80\x81", "schlüssel😀".encode()):
        assert in_log(b"<" + secret + b">", secret) == b"<***>"


@pytest.mark.threat("G06")
def test_a_long_secret_is_masked_and_holds_back_little():
    secret = random.Random(2).randbytes(64 * 1024).replace(b"\n", b"x")
    masker = Masker(needles_for(secret))
    held = 0
    out = []
    for start in range(0, len(secret), 1000):
        out.append(masker.feed(secret[start : start + 1000]))
        held = max(held, masker.hold_back)

    out.append(masker.finish())

    assert b"".join(out) == b"***"
    assert held < LONGEST_NEEDLE


@pytest.mark.threat("G10")
def test_needles_made_to_overlap_thousandfold_stay_fast():
    needles = [b"a" * n for n in range(4, 1000)] + [b"ab" * n for n in range(2, 500)]
    stream = b"a" * 2_000_000

    began = time.monotonic()
    answer = masked_in_pieces(stream, needles, [])

    assert answer == b"***"
    assert time.monotonic() - began < 10


@pytest.mark.threat("G06")
@pytest.mark.parametrize("width", [64, 76])
def test_a_secret_as_large_as_may_be_costs_few_needles_and_shows_none_of_its_wrapped_lines(width):
    secret = random.Random(7).randbytes(32 * 1024).hex().encode()[:-1]
    encoded = base64.b64encode(secret).decode()
    lines = [encoded[place : place + width] for place in range(0, len(encoded), width)]

    needles = needles_for(secret)
    masker = Masker(needles)
    shown = masker.feed("\r\n".join(["before", *lines, "after"]).encode()) + masker.finish()

    # The search is made while every other thread of the runner waits.
    assert sum(map(len, needles)) < 15 * len(secret)
    assert shown.translate(None, b"*\r\n") == b"beforeafter"
