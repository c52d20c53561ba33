"""What most tests of the runner stand on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runner.state_folder import a_state_folder


@pytest.fixture
def state() -> Iterator[Path]:
    with a_state_folder() as folder:
        yield folder
