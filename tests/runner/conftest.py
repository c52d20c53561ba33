"""What most tests of the runner stand on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import respx

from runner.client import Client
from tests.runner.state_folder import a_state_folder

ADDRESS = "http://coordinator.test:3000"


@pytest.fixture
def state() -> Iterator[Path]:
    with a_state_folder() as folder:
        yield folder


@pytest.fixture
def network() -> Iterator[respx.MockRouter]:
    """What stands between a client and its coordinator, in the test's hands."""
    with respx.mock(base_url=ADDRESS, assert_all_called=False) as network:
        yield network


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client(ADDRESS, "the-secret")
    yield client
    client.close()
