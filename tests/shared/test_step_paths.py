"""Which paths a step may name, and what they match."""

import time
from functools import cache
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.references import InvalidReference
from shared.step_paths import cache_dir, could_contain, is_pattern, matches, output_pattern, overlaps

# Outputs


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dist", "dist"),
        ("./a", "a"),
        ("a/", "a"),
        ("./a/b/", "a/b"),
        ("dist/*.whl", "dist/*.whl"),
        ("**", "**"),
        ("**/*.xml", "**/*.xml"),
        ("a/**/**/b", "a/**/b"),
        ("a/[a-z]?[!0-9]", "a/[a-z]?[!0-9]"),
        ("{a,b}", "{a,b}"),
        ("...", "..."),
        ("..a", "..a"),
        (".github/x", ".github/x"),
        ("sub/.git/x", "sub/.git/x"),
        ("-rf", "-rf"),
        ("$(touch x)", "$(touch x)"),
        ("e\u0301", "e\u0301"),
        ("\u00e9", "\u00e9"),
        ("\u017f\u212a", "\u017f\u212a"),
        ("100%", "100%"),
        ("a]", "a]"),
        ("/".join("a" * 64), "/".join("a" * 64)),
        ("/".join(["**", "a"] * 10), "/".join(["**", "a"] * 10)),
    ],
)
def test_an_output_lies_in_the_workspace(text: str, canonical: str) -> None:
    assert output_pattern(text) == canonical
    assert output_pattern(canonical) == canonical


REFUSED_OUTPUTS = {
    "D01": [
        "", ".", "./", "..", "../", "../../etc", "a/../../b", "a/..", "/etc", "/", "//x", "~", "~/x",
        "~root", "./~", "a//b", "a//", ".//a", "a/./b", "./.", "././a",
    ],
    "D02": [
        "%2e%2e/", "%2E%2e/x", "a/%2e%2e", "%252e%252e/x", "a%2fb", "a%5cb", "a%00b", "..\\", "a\\b", "．．/",
        "．．/etc", "a/．．", "．", "‥/x", "․․/x", "﹒﹒", "..／etc", "a\0b", "a\u202eb", "\u2066a", "a\nb",
        "a\x1bb", "a\u0085", "a\u2028", "\ud800",
    ],
    "D19": [".git", ".git/", ".git/config", ".GIT/config", "./.git", ".git/**"],
    "D20": [
        "/".join(["**"] * 50), "/".join(["**", "a"] * 11), "[", "a[", "[a", "[]", "[!]", "[^]", "a/[b/c]",
        "[[:alpha:]]", "[z-a]", "a**", "**.log", "***", "a/**b", "a" * 4097,
        "[a]" * 101, "é" * 2049, "/".join("a" * 65),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, marks=pytest.mark.threat(threat))
        for threat, texts in REFUSED_OUTPUTS.items()
        for text in texts
    ],
)
def test_a_path_that_could_lead_out_or_astray_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        output_pattern(text)


def test_only_wildcards_make_a_pattern() -> None:
    assert [is_pattern(text) for text in ("a*", "a?", "[a]", "**", "{a,b}", "a]")] == [True] * 4 + [False] * 2


# Matching


@pytest.mark.parametrize(
    ("pattern", "taken", "left"),
    [
        ("dist", ["dist", "dist/a", "dist/a/.b"], ["dist2", "a/dist", "dis"]),
        ("a/b", ["a/b", "a/b/c/d"], ["a", "a/bc", "b"]),
        ("*", ["a", ".hidden", "a b"], ["a/b"]),
        ("*.py", ["x.py", ".py"], ["x.pyc", "d/x.py"]),
        ("d/*", ["d/a"], ["d", "d/a/b"]),
        ("**", ["a", "a/b", ".a/.b/c", "sub/.git/x"], []),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a/c"]),
        ("**/x", ["x", "a/x", "a/b/x"], ["ax", "x/a"]),
        ("a/**/b", ["a/b", "a/x/b", "a/b/b", "a/x/y/b"], ["ab", "a/b/c", "b"]),
        ("**/a/**/b", ["a/b", "x/a/y/b"], ["b/a", "a"]),
        ("a?c", ["abc", "a.c", "aéc"], ["ac", "abbc", "a/c"]),
        ("[a-c]x", ["ax", "cx"], ["dx", "x", "-x"]),
        ("[!a-c]x", ["dx", ".x"], ["ax", "x"]),
        ("[^a]", ["b"], ["a"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("[*]", ["*"], ["a"]),
        ("{a,b}*", ["{a,b}", "{a,b}c"], ["a", "b"]),
        ("a*b*c", ["abc", "aXbYc", "abbcc"], ["ab", "acb"]),
        ("**/*.log/x", ["a.log/x", "d/a.log/x"], ["a.log/x/y"]),
        ("A", ["A"], ["a"]),
        ("\u00e9", ["\u00e9"], ["e\u0301"]),
        ("*", ["line\nbreak", "bad\udc80byte"], []),
    ],
)
def test_a_pattern_takes_what_it_names(pattern: str, taken: list[str], left: list[str]) -> None:
    assert [path for path in taken if not matches(pattern, path)] == []
    assert [path for path in left if matches(pattern, path)] == []


@pytest.mark.threat("D03")
def test_twins_that_other_systems_fold_are_told_apart() -> None:
    for one, other in [("\u00e9", "e\u0301"), ("\u212a", "K"), ("\u017f", "s"), ("A", "a")]:
        assert output_pattern(one) == one
        assert matches(one, one)
        assert not matches(one, other)


@pytest.mark.parametrize("pattern", ["**", "*", "*/**", "**/config", ".g*", ".gi?/config", "[.]git/*"])
def test_the_workspaces_own_repository_is_never_taken(pattern: str) -> None:
    assert not matches(pattern, ".git")
    assert not matches(pattern, ".git/config")
    assert not could_contain(pattern, ".git")


@pytest.mark.parametrize(
    ("pattern", "entered", "passed_by"),
    [
        ("a/b/c", ["", ".", "a", "a/b", "a/b/c", "a/b/c/d"], ["b", "a/c", "ab"]),
        ("dist/*.whl", ["", "dist"], ["dist/x", "dist/a.whl", "src"]),
        ("**/x", ["", "a", "a/b/c"], []),
        ("a/**", ["a", "a/b", "a/b/c"], ["b"]),
        ("*/*", ["", "a"], ["a/b"]),
    ],
)
def test_a_walk_enters_only_where_something_could_match(
    pattern: str, entered: list[str], passed_by: list[str]
) -> None:
    assert [place for place in entered if not could_contain(pattern, place)] == []
    assert [place for place in passed_by if could_contain(pattern, place)] == []


def naively_matches(pattern: str, path: str) -> bool:
    """Follow the words of the promise, however long it takes."""
    segments, names = tuple(pattern.split("/")), tuple(path.split("/"))
    if names[0] == ".git":
        return False
    if not is_pattern(pattern):
        return names[: len(segments)] == segments

    @cache
    def segments_match(s: int, n: int) -> bool:
        if s == len(segments):
            return n == len(names)
        if segments[s] == "**":
            if s == len(segments) - 1:
                return n < len(names)
            return any(segments_match(s + 1, m) for m in range(n, len(names) + 1))
        return n < len(names) and letters_match(segments[s], names[n]) and segments_match(s + 1, n + 1)

    return segments_match(0, 0)


def letters_match(pattern: str, name: str) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "*":
        return any(letters_match(pattern[1:], name[i:]) for i in range(len(name) + 1))
    if not name:
        return False
    if pattern[0] == "[":
        inside, _, rest = pattern[1:].partition("]")
        negated = inside[0] in "!^"
        wanted = set(inside[1:] if negated else inside)
        if "a-c" in inside:
            wanted = wanted - {"-"} | set("abc")
        return (name[0] in wanted) != negated and letters_match(rest, name[1:])
    return pattern[0] in ("?", name[0]) and letters_match(pattern[1:], name[1:])


PIECES = st.sampled_from(["a", "b", ".", "*", "?", "[ab]", "[!a]", "[a-c]", "[^b.]", "c"])
SEGMENTS = st.one_of(st.just("**"), st.lists(PIECES, min_size=1, max_size=4).map("".join))
PATTERNS = st.lists(SEGMENTS, min_size=1, max_size=5).map("/".join)
NAMES = st.text("abc.d", min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=5).map("/".join)


@given(PATTERNS, PATHS)
@settings(max_examples=500)
def test_matching_agrees_with_the_naive_way(pattern: str, path: str) -> None:
    try:
        canonical = output_pattern(pattern)
    except InvalidReference:
        return

    assert matches(canonical, path) == naively_matches(canonical, path)


@given(PATTERNS, PATHS)
@settings(max_examples=500)
def test_a_walk_that_prunes_misses_nothing(pattern: str, path: str) -> None:
    try:
        canonical = output_pattern(pattern)
    except InvalidReference:
        return

    if matches(canonical, path):
        above = [str(parent) for parent in PurePosixPath(path).parents]
        assert all(could_contain(canonical, place) for place in above)


@given(st.text(max_size=30))
def test_what_is_accepted_is_canonical_and_stays_inside(text: str) -> None:
    for judge in (output_pattern, cache_dir):
        try:
            canonical = judge(text)
        except InvalidReference as refusal:
            assert refusal.reason
        else:
            assert judge(canonical) == canonical
            assert not {"", ".", ".."} & set(canonical.removeprefix("/").split("/"))


@pytest.mark.threat("D20")
@pytest.mark.parametrize(
    "pattern",
    [
        "/".join(["**", "*"] * 10),
        "/".join(["**", "a*a*a*a*b"] * 10),
        "{a,b}" * 30,
        "*a" * 2000 + "b",
        "?*" * 2000,
        "".join(f"[{chr(0x100 + i)}-{chr(0x3400 + i)}]*" for i in range(100)),
        "[" + "".join(f"{chr(0x400 + i)}-{chr(0x3400 + i)}" for i in range(580)) + "]*",
        "/".join(["*" + "a" * 30 + "*"] * 64),
    ],
)
@pytest.mark.parametrize(
    "path",
    [
        "/".join(["a" * 60] * 64),
        "a" * 255,
        "".join(chr(0x200 + i) for i in range(255)),
        "/".join(["a"] * 2000),
    ],
)
def test_a_nasty_pattern_is_answered_in_no_time(pattern: str, path: str) -> None:
    canonical = output_pattern(pattern)

    # The best of three: another process may hold the processor meanwhile.
    assert (
        min(seconds_to_match(canonical, path) for _ in range(3)) < 0.5
    )  # CPU time; a tenth of a second on an idle machine


def seconds_to_match(pattern: str, path: str) -> float:
    began = time.process_time()
    matches(pattern, path)
    could_contain(pattern, path)
    return time.process_time() - began


# Caches


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("node_modules", "node_modules"),
        ("./target/", "target"),
        ("/workspace/target", "target"),
        ("/workspace/a/b/", "a/b"),
        ("/root/.cache/pip", "/root/.cache/pip"),
        ("/root/.npm/", "/root/.npm"),
        ("/cache/x", "/cache/x"),
        ("/workspaces", "/workspaces"),
        ("/var/cache/apt", "/var/cache/apt"),
        ("/processed", "/processed"),
        ("etc", "etc"),
        ("/opt/lib", "/opt/lib"),
    ],
)
def test_a_cache_lies_in_the_workspace_or_in_the_container(text: str, canonical: str) -> None:
    assert cache_dir(text) == canonical
    assert cache_dir(canonical) == canonical


@pytest.mark.threat("D01")
@pytest.mark.threat("D02")
@pytest.mark.threat("D19")
@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "./", "/", "//", "/.", "/..", "//x", "~", "~/.npm", "../x", "/a/../etc", "/workspace",
        "/workspace/", "/workspace/..", "/workspace/../etc", "/workspace/.git", "/workspace/.git/lfs",
        ".git", ".git/lfs", ".GIT", "/workspace/.Git", "/workspace//x", "/proc", "/proc/self", "/sys",
        "/sys/fs", "/dev", "/dev/shm", "/etc", "/etc/ssl", "/usr", "/usr/local/lib", "/bin", "/sbin", "/lib",
        "/lib/x", "/lib64", "/libx32", "/run", "/run/lock", "/var/run", "/var/run/docker.sock", "/buildmill",
        "/buildmill/log", "/./etc", "/etc/", "a*", "/root/[a]", "a?", "a\\b", "a\0b", "%2e%2e/x", "．．/x",
        "/．．/etc", "a\nb", "a\u202eb", "a:b/../c",
    ],
)  # fmt: skip
def test_a_cache_in_a_place_that_is_not_the_users_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        cache_dir(text)


@pytest.mark.threat("D19")
@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a", "a", True),
        ("a", "a/b", True),
        ("a", "ab", False),
        ("a", "b/a", False),
        ("/root/.cache", "/root/.cache/pip", True),
        ("/root/.cache", "/root/.npm", False),
        ("a", "/a", False),
        ("/x", "x", False),
        ("out", "out/*", True),
        ("out/cache", "out/*", True),
        ("out/cache", "out/**", True),
        ("out/cache/deep", "out/**/x", True),
        ("out/cache", "out/*.txt", False),
        ("out2", "out/*", False),
        ("out", "out/a/*.txt", True),
        ("node_modules", "**/*.xml", False),
        ("node_modules", "*", False),
        ("/root/x", "root/*", False),
        ("a/*", "a/b/?", True),
        ("a/*", "b/*", False),
    ],
)
def test_two_claims_to_one_place_overlap(one: str, other: str, expected: bool) -> None:
    assert overlaps(one, other) is expected
    assert overlaps(other, one) is expected
