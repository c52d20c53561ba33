"""One executor per test over the engine of this machine; whatever a test leaves is removed."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.executor.docker import DockerExecutor, open_docker


@pytest.fixture
def runner() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def executor(runner: str, tmp_path: Path) -> Iterator[DockerExecutor]:
    made = open_docker(runner=runner, state=tmp_path / "state", environ=os.environ, holders_ahead=1)
    yield made
    for leftover in made.leftovers():
        made.remove_leftover(leftover)
    made.close()
