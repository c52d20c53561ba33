"""Imports go one way, as the docstrings of the packages say, and some names are known in one place only."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SURFACES = ("build_server", "executions", "deployments")


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, wherever in it, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def order_of(package: str) -> dict[str, int]:
    """The place of every module, read from the docstring of its package."""
    docstring = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    line = re.search(r"^shared\b.*?(?:\bcli$)", docstring or "", re.MULTILINE | re.DOTALL)
    assert line is not None, f"{package}/__init__.py draws no line of imports"
    places = line.group().replace("\n", " ").split(">")
    return {
        name.strip(): place for place, names in enumerate(places) for name in names.strip(" {}").split(",")
    }


def module_in(package: str, path: Path) -> str:
    return path.relative_to(ROOT / package).parts[0].removesuffix(".py")


@pytest.mark.parametrize("package", ["coordinator", "runner"])
def test_every_module_has_its_place_in_the_line(package: str) -> None:
    modules = {module_in(package, path) for path in files_of(package)} - {"__init__", "__main__"}

    assert modules - set(order_of(package)) == set(), "name these in the docstring of the package"
    assert set(order_of(package)) - modules == {"shared"}, "these are not there any more"


@pytest.mark.parametrize("package", ["coordinator", "runner"])
def test_no_module_imports_what_stands_right_of_it(package: str) -> None:
    order = order_of(package)
    wrong = []
    for path in files_of(package):
        here = module_in(package, path)
        if here in ("__init__", "__main__"):
            continue
        for name, line in imports_of(path):
            parts = name.split(".")
            if parts[0] == package and parts[1] != here and order[parts[1]] >= order[here]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")

    assert wrong == []


@pytest.mark.parametrize(
    ("package", "others"),
    [("coordinator", {"runner"}), ("runner", {"coordinator"}), ("shared", {"coordinator", "runner"})],
)
def test_the_two_sides_share_only_what_is_shared(package: str, others: set[str]) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files_of(package)
        for name, line in imports_of(path)
        if name.split(".")[0] in {*others, "tests"}
    ]

    assert wrong == []


def test_what_is_shared_needs_three_libraries_at_most() -> None:
    known = {*sys.stdlib_module_names, "shared", "pydantic", "structlog"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files_of("shared")
        for name, line in imports_of(path)
        if name.split(".")[0] not in known
    ]

    assert wrong == []


@pytest.mark.parametrize(
    ("library", "at_home"),
    [
        ("docker", {f"runner/executor/{name}.py" for name in ("docker", "housekeeping", "answers")}),
        (
            "httpx",
            {
                "runner/client.py",
                "coordinator/cli/remote.py",
                "coordinator/cli/administer.py",
                "coordinator/cli/in_process.py",
                "coordinator/cli/drill",
            },
        ),
        ("uvicorn", {"coordinator/api/server.py", "coordinator/api/socket_protocol.py", "coordinator/cli"}),
        ("alembic", {"coordinator/store/migrate.py", "coordinator/store/migrations"}),
        ("starlette", {"coordinator/api", "coordinator/app.py", "coordinator/cli/in_process.py"}),
        ("sqlalchemy", {"coordinator/store", "coordinator/tables.py", "coordinator/access_tables.py"}),
        ("fcntl.flock", {"coordinator/cli/serve.py", "coordinator/cli/administer.py"}),
    ],
)
def test_a_library_is_known_at_its_home_only(library: str, at_home: set[str]) -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in ("coordinator", "runner", "shared")
        for path in files_of(package)
        for name, _ in imports_of(path)
        if name == library or name.startswith(library + ".")
    }

    strangers = {
        user for user in users if not any(user == home or user.startswith(home + "/") for home in at_home)
    }
    assert strangers == set()


def test_outside_of_the_store_the_database_is_a_session_and_nothing_more() -> None:
    allowed = {"sqlmodel.Session"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files_of("coordinator")
        for name, line in imports_of(path)
        if name.startswith("sqlmodel")
        and name not in allowed
        and module_in("coordinator", path) not in ("store", "tables", "access_tables")
    ]

    assert wrong == []


def test_surfaces_do_not_know_each_other() -> None:
    wrong = []
    for surface in SURFACES:
        others = tuple(f"coordinator.api.{other}" for other in SURFACES if other != surface)
        for path in files_of(f"coordinator/api/{surface}"):
            wrong += [f"{path}:{line}" for name, line in imports_of(path) if name.startswith(others)]

    assert wrong == []


def test_rules_and_shared_words_do_nothing_to_the_world() -> None:
    """No clock, no disk, no network: what is decided there follows from what is handed in."""
    doers = {"os", "time", "socket", "subprocess", "asyncio", "threading", "pathlib", "random"}
    allowed = {"shared/ids.py", "shared/clock.py"}  # ids of the time and of chance, and the time itself
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package in ("coordinator/rules", "shared")
        for path in files_of(package)
        for name, line in imports_of(path)
        if name.split(".")[0] in doers and str(path.relative_to(ROOT)) not in allowed
    ]

    assert wrong == []


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    allowed = {"coordinator/site.py"}  # nobody imports the other `site` by hand
    wrong = [
        str(path.relative_to(ROOT))
        for package in ("coordinator", "runner", "shared")
        for path in files_of(package)
        if path.stem in sys.stdlib_module_names
        and not path.stem.startswith("__")
        and str(path.relative_to(ROOT)) not in allowed
    ]

    assert wrong == []


def test_an_action_is_a_file_with_a_function_of_the_same_name() -> None:
    shared_by_actions = {"leased_step", "runner_session", "renew_leases", "store_blob", "__init__"}
    for path in files_of("coordinator/actions"):
        names = {
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, ast.FunctionDef)
        }
        assert path.stem in names or path.stem in shared_by_actions, path.stem
