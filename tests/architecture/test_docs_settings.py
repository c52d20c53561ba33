"""docs/configuration.md lists every setting with its default and its meaning, word for word."""

import re
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings

from coordinator.settings import Settings as CoordinatorSettings
from runner.settings import Settings as RunnerSettings

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def rows_of(settings: type[BaseSettings]) -> list[str]:
    """The table as it has to stand in the page."""
    rows = []
    for name, field in settings.model_fields.items():
        default = "" if field.default in ("", None) else f"`{shown(field.default)}`"
        assert field.description, f"{name} has no meaning"
        rows.append(f"| `BUILDMILL_{name.upper()}` | {default} | {field.description} |")
    return rows


def shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(
    ("heading", "settings"), [("Coordinator", CoordinatorSettings), ("Runner", RunnerSettings)]
)
def test_the_page_lists_the_settings_there_are(heading: str, settings: type[BaseSettings]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/configuration.md has no section {heading}"

    found = [line for line in section.group(1).splitlines() if line.startswith("| `BUILDMILL_")]

    assert found == rows_of(settings), "\n" + "\n".join(rows_of(settings))


@pytest.mark.parametrize("settings", [CoordinatorSettings, RunnerSettings])
def test_meanings_are_one_line_that_a_table_can_hold(settings: type[BaseSettings]) -> None:
    for name, field in settings.model_fields.items():
        description = field.description or ""
        assert "\n" not in description and "|" not in description, name
        assert not description.endswith("."), name
