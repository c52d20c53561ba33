"""The scripts keep their promises: strict, executable, documented, and free of addresses."""

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file() and path.suffix == "")
COMMANDS = [*SCRIPTS, ROOT / ".ci" / "run"]

PACKAGE_HOSTS = re.compile(
    r"""  \b(pypi|pythonhosted|npmjs|npmmirror|crates)\.(org|com|io)\b
        | \b(deb|security|archive|ports|snapshot)\.(debian|ubuntu)\.(org|com)\b
        | \b(registry[a-z0-9.-]*|ghcr|quay|gcr)\.(docker\.)?(io|com)\b
        | ^\s*(--)?(extra-)?index[-]url\b | ^\s*--find-links\b | "resolved":\s*"https?: """,
    re.VERBOSE | re.MULTILINE,
)
HOW_PACKAGES_ARE_FETCHED = [
    *COMMANDS,
    ROOT / "pyproject.toml",
    ROOT / "constraints.txt",
    *sorted(ROOT.glob("*/page/package*.json")),
]


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("script", COMMANDS, ids=by_name)
def test_a_script_can_be_run_and_stops_at_its_first_error(script: Path) -> None:
    text = script.read_text()

    assert os.access(script, os.X_OK)
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text


@pytest.mark.parametrize("script", COMMANDS, ids=by_name)
def test_bash_understands_a_script(script: Path) -> None:
    answer = subprocess.run(["bash", "-n", script], capture_output=True, text=True, timeout=20)

    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=by_name)
def test_the_readme_says_what_a_script_is_for(script: Path) -> None:
    described = re.findall(
        r"^\| `([a-z-]+)` \| \S", (ROOT / "scripts" / "README.md").read_text(), re.MULTILINE
    )

    assert script.name in described


@pytest.mark.parametrize("file", HOW_PACKAGES_ARE_FETCHED, ids=by_name)
def test_no_package_host_is_named_where_packages_are_fetched(file: Path) -> None:
    assert PACKAGE_HOSTS.findall(file.read_text()) == []


def test_every_dependency_is_pinned() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = wanted["dependency-groups"].values()
    requirements = [*wanted["project"]["dependencies"], *(line for group in groups for line in group)]
    names = {re.split(r"[\[<>=!~; ]", line, maxsplit=1)[0].lower().replace("_", "-") for line in requirements}

    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]

    assert [line for line in pins if not re.match(r"^[a-z0-9-]+==[0-9][^ ]*( ; .+)?$", line)] == []
    assert names - {line.split("==")[0] for line in pins} == set()


def test_every_suite_has_a_budget_and_all_fit_into_48_minutes() -> None:
    seconds = tomllib.loads((ROOT / "tests" / "budget.toml").read_text())["seconds"]

    suites = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").rglob("test_*.py")}

    assert suites - set(seconds) == set()
    assert sum(seconds.values()) <= 48 * 60


@pytest.fixture
def foreign_process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_stopping_the_engine_leaves_a_process_alone_that_we_did_not_start(
    tmp_path: Path, foreign_process: subprocess.Popen[bytes]
) -> None:
    record = tmp_path / "record"
    record.write_text(f"{foreign_process.pid} 1\n")
    stand_in = tmp_path / "engine"
    script = (ROOT / "scripts" / "engine").read_text()
    stand_in.write_text(script.replace("/var/run/buildmill-engine.pid", str(record)))

    answer = subprocess.run(["bash", stand_in, "stop"], capture_output=True, text=True, timeout=40)

    assert answer.returncode == 0
    assert "nothing to stop" in answer.stderr
    assert foreign_process.poll() is None
