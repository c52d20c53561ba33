"""One file knows which database it is."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = "coordinator/store/dialect.py"
DRIVERS = {"sqlite3", "pysqlite3", "psycopg", "sqlalchemy.dialects"}
# What these say is part of their own job: the default address, a type that has to differ, the lock of a file.
ALLOWED = {"coordinator/settings.py", "coordinator/tables.py", "coordinator/cli/serve.py"}


def other_files() -> list[Path]:
    return [
        path
        for package in ("coordinator", "runner", "shared")
        for path in sorted((ROOT / package).rglob("*.py"))
        if str(path.relative_to(ROOT)) != HOME
    ]


def test_no_other_file_imports_a_driver_or_a_dialect() -> None:
    wrong = []
    for path in other_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            wrong += [f"{path}:{name}" for name in names if name.startswith(tuple(DRIVERS))]

    assert wrong == []


def test_no_other_file_asks_for_a_database_by_its_name() -> None:
    """Words in sentences are free; a text that is nothing but the name, or begins an address, is not."""
    name = re.compile(r"(sqlite|postgres|postgresql|psycopg)(\b[:+].*)?", re.DOTALL)
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in other_files()
        if str(path.relative_to(ROOT)) not in ALLOWED
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and name.fullmatch(node.value)
    ]

    assert wrong == []
