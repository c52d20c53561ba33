"""docs/states.md says what the state machine does."""

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path

import pytest

from coordinator.rules.transitions import BUILD_TRANSITIONS, STEP_TRANSITIONS
from shared.reasons import MEANINGS, Reason
from shared.states import BuildState, StepState

PAGE = Path(__file__).parents[2] / "docs" / "states.md"
Table = Mapping[StrEnum, tuple[frozenset[StrEnum], StrEnum]]


def section(heading: str) -> str:
    found = re.search(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"docs/states.md has no section {heading}"
    return found.group(1)


def rows_of(transitions: Table, states: type[StrEnum]) -> list[tuple[str, str, str]]:
    return [
        (str(event), ", ".join(f"`{state}`" for state in states if state in sources), str(target))
        for event, (sources, target) in transitions.items()
    ]


@pytest.mark.parametrize(
    ("heading", "transitions", "states"),
    [("Steps", STEP_TRANSITIONS, StepState), ("Builds", BUILD_TRANSITIONS, BuildState)],
)
def test_the_page_shows_every_event_with_its_sources_and_its_target(
    heading: str, transitions: Table, states: type[StrEnum]
) -> None:
    found = re.findall(r"^\| `([a-z_]+)` \| (`.+`) \| `([a-z]+)` \|", section(heading), re.MULTILINE)

    assert found == rows_of(transitions, states)


@pytest.mark.parametrize(("heading", "states"), [("Steps", StepState), ("Builds", BuildState)])
def test_the_page_explains_every_state(heading: str, states: type[StrEnum]) -> None:
    explained = re.findall(r"^- `([a-z]+)`: ", section(heading), re.MULTILINE)

    assert explained == [str(state) for state in states]


def test_the_page_lists_every_reason_with_its_class_and_meaning() -> None:
    found = re.findall(
        r"^\| `([a-z_]+)` \| (user|infrastructure) \| (.+) \|$", section("Reasons"), re.MULTILINE
    )

    assert found == [
        (str(reason), "infrastructure" if reason.is_infrastructure else "user", MEANINGS[reason])
        for reason in Reason
    ]
