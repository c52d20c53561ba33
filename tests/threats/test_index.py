"""Every threat case we answer has a test that bears its id, or a reason why it has nothing to attack yet."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ABSENT = Path(__file__).with_name("absent.toml")

ANSWERED = {
    "A": [*range(1, 28), 29, 30],
    "B": [*range(1, 15)],
    "C": [*range(1, 6), *range(9, 14)],
    "D": [*range(1, 16), *range(18, 23)],
    "E": [*range(1, 5), *range(7, 11)],
    "F": [*range(1, 9)],
    "I": [*range(1, 17)],
    "G": [1, 2, 3, 4, 5, 6, 8, 9, 10],
    "H": [1, 2, 3, 4, 7, 8, 10, 11],
    "K": [5],
    "L": [*range(1, 10), *range(11, 15), 16, 19, 20, 22, 23],
}
HOW_MANY = {"A": 30, "B": 16, "C": 14, "D": 22, "E": 16, "F": 14, "G": 10, "H": 11, "I": 20, "J": 8} | {
    "K": 9,
    "L": 24,
    "M": 12,
    "N": 5,
}


def threats_in(source: str) -> set[str]:
    """The ids in all `mark.threat(...)` of a module: written out, or taken from a table of the module."""
    tree = ast.parse(source)
    found = set()
    for mark in _marks(tree):
        for argument in mark.args:
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                found.add(argument.value)
            elif isinstance(argument, ast.Name):
                found |= _keys_behind(tree, argument.id)
    return found


def _marks(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "threat":
            yield node


def _keys_behind(tree: ast.AST, name: str) -> set[str]:
    """The keys of the table in `for name, ... in TABLE.items()`."""
    tables = {
        node.iter.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.comprehension)
        and name in {part.id for part in ast.walk(node.target) if isinstance(part, ast.Name)}
        and isinstance(node.iter, ast.Call)
        and isinstance(node.iter.func, ast.Attribute)
        and isinstance(node.iter.func.value, ast.Name)
    }
    return {
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        if {target.id for target in node.targets if isinstance(target, ast.Name)} & tables
        for key in node.value.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }


def threats_of_all_tests() -> set[str]:
    return set().union(*(threats_in(path.read_text()) for path in sorted(TESTS.rglob("test_*.py"))))


def absent() -> dict[str, str]:
    """Each absent case with its reason, ranges such as J01-J08 written out."""
    written = tomllib.loads(ABSENT.read_text())["reason"]
    return {case: reason for cases, reason in written.items() for case in _cases(cases)}


def _cases(text: str) -> Iterator[str]:
    first, _, last = text.partition("-")
    for number in range(int(first[1:]), int((last or first)[1:]) + 1):
        yield f"{first[0]}{number:02}"


def answered() -> set[str]:
    return {f"{group}{number:02}" for group, numbers in ANSWERED.items() for number in numbers}


def known() -> set[str]:
    return {f"{group}{number:02}" for group, count in HOW_MANY.items() for number in range(1, count + 1)}


def test_every_case_we_answer_has_a_test() -> None:
    assert sorted(answered() - threats_of_all_tests()) == []


def test_no_case_is_both_tested_and_absent() -> None:
    assert sorted(threats_of_all_tests() & set(absent())) == []


def test_every_id_is_the_id_of_a_case() -> None:
    assert sorted((threats_of_all_tests() | set(absent())) - known()) == []


def test_every_absence_has_a_reason() -> None:
    assert all(re.search(r"\w+ \w+", reason) for reason in absent().values())


def test_marks_are_read_from_decorators_parameters_and_tables() -> None:
    source = """
TABLE = {"B01": ["x"], "B02": ["y"]}
@pytest.mark.threat("A01")
@pytest.mark.parametrize("t", [pytest.param(1, marks=pytest.mark.threat("A02"))])
def test_one(t): ...
@pytest.mark.parametrize("t", [
    pytest.param(x, marks=pytest.mark.threat(case)) for case, texts in TABLE.items() for x in texts])
def test_two(t): ...
"""

    assert threats_in(source) == {"A01", "A02", "B01", "B02"}
