"""An engine that breaks off in the middle of a pull is one that is away, and no failure of its own kind."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docker
import pytest

from runner.errors import EngineUnavailable
from runner.executor.docker import open_docker
from tests.engine.registry import a_registry

pytestmark = [
    pytest.mark.engine,
    # The engine's client leaves the socket of a lost connection to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
ENGINE = "/var/run/docker.sock"


class Line:
    """Stands between a runner and the machine's engine, and can hang up on all at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: list[socket.socket] = []
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(str(path))
        self._door.listen(50)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = self._door.accept()
                engine = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                engine.connect(ENGINE)
                self._open += [caller, engine]
                for source, sink in ((caller, engine), (engine, caller)):
                    threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)

    def hang_up(self) -> None:
        self._path.unlink(missing_ok=True)
        for end in [self._door, *self._open]:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path / "engine.sock")
    yield made
    made.hang_up()


def test_a_pull_that_the_engine_breaks_off_can_be_asked_for_again(line, runner, tmp_path) -> None:
    environ = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/engine.sock"}
    executor = open_docker(runner=runner, state=tmp_path, environ=environ, holders_ahead=0)
    with a_registry() as (registry, host), ThreadPoolExecutor(1) as threads:
        image = f"{host}/trickle/image:1"
        pull = threads.submit(executor.pull, image, deadline_s=60, progress=lambda line: None)
        assert registry.trickling.wait(30)

        line.hang_up()

        with pytest.raises(EngineUnavailable):
            pull.result(timeout=30)
    executor.close()
    api = docker.APIClient(version="auto")
    with contextlib.closing(api), contextlib.suppress(docker.errors.NotFound):
        api.remove_image(image)
