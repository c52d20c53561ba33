"""The patterns in the specification and the judges in the code accept the same texts."""

import re
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from coordinator.api import patterns
from shared.references import InvalidReference, commit_hash, display_name, env_name, label, secret_name, slug


def accepts(judge: Callable[[str], str], text: str) -> bool:
    try:
        judge(text)
    except InvalidReference:
        return False
    return True


def fits(pattern: str, text: str) -> bool:
    # `$` in Python also stands before a final newline, in a specification it does not
    return re.search(pattern.removesuffix("$") + r"\Z", text) is not None


@given(st.text(min_size=1, max_size=100))
@example("a\n")
@example(" a")
@example("a\u3000")
@example("a\u202eb")
@example("\ufeffa")
@example("a b")
def test_the_pattern_of_names_accepts_what_the_judge_accepts(text: str) -> None:
    assert fits(patterns.DISPLAY_NAME, text) == accepts(display_name, text)


@pytest.mark.parametrize(
    ("pattern", "judge", "alphabet", "longest"),
    [
        (patterns.SLUG, slug, "aZ0._/- é\n", 50),
        (patterns.LABEL, label, "aZ0._=-/ é\n", 64),
        (patterns.COMMIT, commit_hash, "0123abcdefgF\n", 70),
        (patterns.ENV_NAME, env_name, "aZ0_- é\n", 20),
        (patterns.SECRET_NAME, secret_name, "AZa0_- é\n", 70),
    ],
)
def test_a_pattern_accepts_what_its_judge_accepts(
    pattern: str, judge: Callable[[str], str], alphabet: str, longest: int
) -> None:
    @given(st.text(alphabet, min_size=1, max_size=longest).filter(lambda text: text != "_"))
    def same(text: str) -> None:
        assert fits(pattern, text) == accepts(judge, text)

    same()


@pytest.mark.parametrize("name", ["BUILDMILL_X", "LD_PRELOAD", "BASH_FUNC_x"])
def test_reserved_variables_do_not_fit_their_pattern(name: str) -> None:
    assert not fits(patterns.ENV_NAME, name)
    assert not accepts(env_name, name)
