"""A stage on both databases; each test has one of its own."""

from collections.abc import Iterator

import pytest

from coordinator.store.dialect import Database
from tests.trip.stage import Stage, a_stage


@pytest.fixture
def stage(database: Database) -> Iterator[Stage]:
    with a_stage(database) as stage:
        yield stage
