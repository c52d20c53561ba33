"""Bodies and query strings that two readers could read differently, or that no column can hold."""

import json
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.api.strict_json import BadJson, check_text, parse, parse_query

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00")), inner, max_size=5
        )
    ),
    max_leaves=20,
)


def refusal_of(body: bytes) -> BadJson:
    with pytest.raises(BadJson) as caught:
        parse(body)
    return caught.value


@given(JSON_VALUES, st.booleans())
def test_every_value_that_python_writes_is_read_back(value: object, ascii_only: bool) -> None:
    assert parse(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200) | st.text('[]{}",:\\u0dD8-19eE. ntf', max_size=80).map(str.encode))
def test_any_bytes_are_either_read_as_json_reads_them_or_refused(body: bytes) -> None:
    try:
        value = parse(body)
    except BadJson as refusal:
        assert refusal.path
        assert refusal.reason
    else:
        assert value == json.loads(body)


@pytest.mark.threat("L02")
@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
@pytest.mark.parametrize("closed", [False, True])
def test_deep_nesting_is_refused_before_it_is_parsed(opening: bytes, closed: bool) -> None:
    closing = b"".join(b"]" if byte == ord("[") else b"}" for byte in reversed(opening) if byte in b"[{")
    body = opening * 50_000 + (b"1" + closing * 50_000 if closed else b"")

    assert "nested" in refusal_of(body).reason


@pytest.mark.threat("L02")
def test_nesting_is_allowed_up_to_the_limit_and_brackets_in_strings_do_not_count() -> None:
    assert parse(b"[" * 64 + b"]" * 64) is not None
    assert parse(b'"' + b"[{" * 1000 + b'"') == "[{" * 1000
    assert parse(b'["\\"[' + b"[" * 1000 + b'\\\\", 1]') == ['"[' + "[" * 1000 + "\\", 1]
    assert "nested" in refusal_of(b"[" * 65 + b"]" * 65).reason


@pytest.mark.threat("L02")
@pytest.mark.parametrize("body", [b"[" + b"1," * 200_000 + b"1]", b"[" + b"[]," * 100_000 + b"[]]"])
def test_too_many_values_are_refused(body: bytes) -> None:
    assert "more than 200000 values" in refusal_of(body).reason


@pytest.mark.threat("L02")
@pytest.mark.parametrize("body", [b"1" * 100_000, b"[-" + b"1" * 100_000 + b"]", b"0." + b"1" * 100_000])
def test_a_number_of_a_hundred_thousand_digits_costs_nothing(body: bytes) -> None:
    started = time.process_time()

    assert "more than 19 digits" in refusal_of(body).reason

    assert time.process_time() - started < 1


@pytest.mark.threat("L02")
@pytest.mark.parametrize(
    "body",
    [
        b'"' * 2**20,
        b"\\" * 2**20,
        b'\\"' * 2**19,
        b'"' + b'\\"' * 2**19,
        b"]" * 2**20,
        b"[" + b"[]," * 99_000 + b"[]]",
        b'["' + b"\\ud83d\\ude00" * 2**16 + b'"]',
        b"[" + b'{"a":1},' * 90_000 + b'{"a":1,"a":2}]',
    ],
)
def test_no_body_of_a_megabyte_takes_long_or_much_memory(body: bytes) -> None:
    started = time.process_time()
    parsed_or_refused(body)
    spent = time.process_time() - started

    tracemalloc.start()
    parsed_or_refused(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert spent < 1
    assert peak < 80 * 2**20


def parsed_or_refused(body: bytes) -> None:
    try:
        parse(body)
    except BadJson as refusal:
        assert refusal.reason


@pytest.mark.threat("L03")
@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'{"role":"viewer","role":"admin"}', "role"),
        (b'{"role":"viewer","\\u0072ole":"admin"}', "role"),
        (b'{"steps":[{},{"name":"a","b":{},"name":"c"}]}', "steps[1].name"),
        (b'[{"a":{"x y":1,"x y":1}}]', 'body[0].a["x y"]'),
        (b'{"":1,"":2}', 'body[""]'),
    ],
)
def test_a_key_given_twice_is_refused_at_its_place(body: bytes, path: str) -> None:
    refusal = refusal_of(body)

    assert refusal.path == path
    assert refusal.reason == "is given more than once"


@pytest.mark.threat("L03")
def test_a_key_given_twice_in_something_that_is_no_json_is_refused() -> None:
    assert "not JSON" in refusal_of(b'[{"a":1,"a":2}, x]').reason


@pytest.mark.threat("L04")
@pytest.mark.parametrize(
    "number",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1.5E+400",
        "-0",
        "9223372036854775808",
        "-9223372036854775809",
        "1000000000000000000000000000000",
        "01",
        "+1",
        ".5",
        "1.",
        "0x10",
        "1_000",
    ],
)
def test_numbers_that_not_everybody_can_hold_are_refused(number: str) -> None:
    assert refusal_of(b'{"limit": %s}' % number.encode()).reason


@pytest.mark.threat("L04")
@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("1.0", 1.0),
        ("1e3", 1000.0),
        ("-0.5", -0.5),
        ("-0.0", 0.0),
    ],
)
def test_other_numbers_keep_their_value_and_their_kind(text: str, number: object) -> None:
    read = parse(text.encode())

    assert read == number
    assert type(read) is type(number)


@pytest.mark.threat("L05")
@pytest.mark.parametrize(
    ("body", "path"),
    [
        (b'"\\u0000"', "body"),
        (b'{"steps":[{"name":"a"},{"name":"a\\u0000b"}]}', "steps[1].name"),
        (b'{"env":{"a\\u0000":"x"}}', 'env["a\\x00"]'),
    ],
)
def test_a_nul_character_in_any_string_is_refused(body: bytes, path: str) -> None:
    refusal = refusal_of(body)

    assert refusal.path == path
    assert "NUL" in refusal.reason


@pytest.mark.threat("L05")
def test_an_escaped_backslash_before_u0000_is_text() -> None:
    assert parse(b'"\\\\u0000"') == "\\u0000"


@pytest.mark.threat("L06")
@pytest.mark.parametrize("text", ["\\ud800", "\\udfff", "a\\uD83Db", "\\ude00\\ud83d"])
def test_half_of_a_surrogate_pair_is_refused(text: str) -> None:
    assert "surrogate" in refusal_of(b'{"a": "%s"}' % text.encode()).reason
    assert "surrogate" in refusal_of(b'{"%s": 1}' % text.encode()).reason


@pytest.mark.threat("L06")
def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse(b'"\\ud83d\\ude00"') == "\U0001f600"


@pytest.mark.threat("L06")
@pytest.mark.parametrize(
    "body",
    [
        b'"\xff"',
        b'"\xc0\x80"',
        b'"\xed\xa0\x80"',
        b'"\xf4\x90\x80\x80"',
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        "{}".encode("utf-16-le"),
        "{}".encode("utf-32"),
    ],
)
def test_only_utf_8_is_read(body: bytes) -> None:
    assert refusal_of(body).path == "body"


@pytest.mark.threat("L04")
@pytest.mark.parametrize(
    "body", [b"", b" ", b"{} x", b"{}{}", b"[1,]", b"{'a':1}", b'"\x01"', b'"\n"', b"// x\n1", b"nul"]
)
def test_what_is_not_exactly_one_json_value_is_refused(body: bytes) -> None:
    assert refusal_of(body).path == "body"


@pytest.mark.threat("L06")
def test_a_refusal_can_always_be_sent() -> None:
    refusal = refusal_of(b'{"\\ud800\\u0007%s": 1}' % (b"x" * 1000))

    assert len(str(refusal).encode("utf-8")) < 200
    assert str(refusal).isprintable()


@pytest.mark.parametrize(
    ("text", "is_sound"), [("", True), ("é\U0001f600", True), ("a\x00", False), ("\ud800", False)]
)
def test_a_text_is_checked_by_itself(text: str, is_sound: bool) -> None:
    assert (check_text(text) is None) == is_sound


def test_a_query_string_is_decoded() -> None:
    assert parse_query(b"") == {}
    assert parse_query(b"limit=1&status=a%20b+c&x=%C3%A9&flag&e=&q=a=b&") == {
        "limit": "1",
        "status": "a b c",
        "x": "é",
        "flag": "",
        "e": "",
        "q": "a=b",
    }


@pytest.mark.threat("L09")
@pytest.mark.parametrize(
    ("query", "path"),
    [
        (b"limit=1&limit=2", "limit"),
        (b"limit=1&limi%74=2", "limit"),
        (b"limit&limit", "limit"),
        (b"a=%", "a"),
        (b"a=%1", "a"),
        (b"a=%zz", "a"),
        (b"%=1", "query"),
        (b"a=%ff", "a"),
        (b"a=%c0%80", "a"),
        (b"a=%ed%a0%80", "a"),
        (b"%ff=1", "query"),
        (b"a=\xc3\xa9", "a"),
        (b"a=%00", "a"),
        (b"a%00=1", "query"),
        (b"&".join(b"%d=1" % n for n in range(65)), "query"),
        (b"a=" + b"x" * 9000, "query"),
    ],
)
def test_a_query_string_that_can_be_read_in_two_ways_is_refused(query: bytes, path: str) -> None:
    with pytest.raises(BadJson) as caught:
        parse_query(query)

    assert caught.value.path == path


@pytest.mark.threat("L09")
def test_brackets_do_not_make_a_list() -> None:
    assert parse_query(b"limit[]=1&limit=2") == {"limit[]": "1", "limit": "2"}
