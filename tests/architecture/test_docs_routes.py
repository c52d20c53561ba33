"""The pages about the APIs tell of every route, once, and of none that does not exist."""

import re
from pathlib import Path

from coordinator.app import ALL_ENDPOINTS
from coordinator.rules.access import Audience

FOLDER = Path(__file__).parents[2] / "docs" / "api"
PAGE = "\n".join(path.read_text() for path in sorted(FOLDER.glob("*.md")))
ROW = re.compile(r"^\| `([A-Z]+)` \| `(/[^`]*)` \| ([a-z ]+) \| \S.*\|$", re.MULTILINE)
WHO = {
    Audience.ANYONE: "anyone",
    Audience.USER: "user",
    Audience.ENROLMENT: "enrolment",
    Audience.RUNNER: "runner",
    Audience.STEP: "user or runner",
}


def test_every_route_is_documented_with_who_may_call_it_and_none_that_does_not_exist() -> None:
    documented = [row.groups() for row in ROW.finditer(PAGE)]

    existing = [(one.method, one.path, WHO[one.policy.audience]) for one in ALL_ENDPOINTS]

    assert sorted(documented) == sorted(existing)


def test_routes_of_the_published_contract_are_marked() -> None:
    marked = {
        row[1:3] for row in re.findall(r"^(\| `([A-Z]+)` \| `(/[^`]*)` \|.*\| yes \|)$", PAGE, re.MULTILINE)
    }

    assert marked == {(one.method, one.path) for one in ALL_ENDPOINTS if one.is_contract}
