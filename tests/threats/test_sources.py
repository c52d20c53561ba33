"""A repository, its address and its server against a runner that nobody protects: the API is left out."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.errors import StepError
from runner.git import Budget, unprivileged_user
from runner.source import SourceCache
from shared.protocol import Source
from shared.reasons import Reason
from tests.runner.repositories import Repository
from tests.runner.state_folder import a_state_folder
from tests.threats.test_api import ADDRESSES

MIB = 1024 * 1024
PROTOCOLS = frozenset({"https", "http", "ssh", "file"})


@pytest.fixture
def folder() -> Iterator[Path]:
    with a_state_folder() as folder:
        yield folder


@pytest.fixture
def traced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every git that is started appends its arguments to this file, and so would a payload leave its mark."""
    trace, fake = folder / "trace", folder / "bin" / "git"
    trace.touch()
    trace.chmod(0o666)
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {trace}\nexit 128\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    return trace


@pytest.mark.parametrize(
    "address",
    [
        pytest.param(address, marks=pytest.mark.threat(case), id=f"{case}-{number}")
        for case, addresses in ADDRESSES.items()
        for number, address in enumerate(addresses)
    ],
)
def test_an_address_that_slipped_past_the_api_never_reaches_git(
    folder: Path, traced: Path, address: str
) -> None:
    sources = SourceCache(folder / "state", protocols=PROTOCOLS, run_as=unprivileged_user())
    before = traced.read_text()

    with pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=address, branch="main"))

    assert caught.value.reason is Reason.BAD_CONFIG
    assert traced.read_text() == before
    assert not list(Path("/tmp").glob("PWN*"))


@pytest.mark.threat("B03")
@pytest.mark.threat("C10")
@pytest.mark.parametrize(
    "name",
    ["--upload-pack=touch /tmp/PWN-B03", "--output=/tmp/PWN", "-c", "HEAD@{1}", ":/msg", "a..b", "a/../b"],
)  # fmt: skip
def test_a_reference_that_slipped_past_the_api_names_nothing(folder: Path, name: str) -> None:
    repository = Repository(folder / "repository")
    repository.commit({"a.txt": "a"}, message="msg")
    sources = SourceCache(folder / "state", protocols=PROTOCOLS, run_as=unprivileged_user())

    for source in (
        Source(repo_url=repository.url, branch=name),
        Source(repo_url=repository.url, commit=name),
    ):
        with pytest.raises(StepError) as caught:
            sources.resolve(source)
        assert caught.value.reason is Reason.COMMIT_NOT_FOUND
    with pytest.raises(StepError):
        sources.checkout(Source(repo_url=repository.url), name)
    assert not list(Path("/tmp").glob("PWN*"))


@pytest.mark.threat("C11")
@pytest.mark.parametrize("copies", [1, 64])
def test_a_pack_that_unfolds_to_a_hundred_times_its_size_is_not_unfolded(folder: Path, copies: int) -> None:
    repository = Repository(folder / "repository")
    zeros = "\0" * (64 * MIB // copies)
    repository.commit({f"folder/{number}": zeros for number in range(copies)})
    packed = sum(path.stat().st_size for path in (repository.path / ".git" / "objects").rglob("*"))
    sources = SourceCache(
        folder / "state", protocols=PROTOCOLS, run_as=unprivileged_user(), budget=Budget(bytes=4 * MIB)
    )

    with pytest.raises(StepError) as caught:
        commit = sources.resolve(Source(repo_url=repository.url, branch="main"))
        sources.checkout(Source(repo_url=repository.url, branch="main"), commit)

    assert packed < MIB
    assert caught.value.reason is Reason.DISK_LIMIT
    written = sum(path.lstat().st_blocks * 512 for path in (folder / "state").rglob("*"))
    assert written < 8 * MIB


class Dribbler:
    """A web server that answers, and then says a byte now and then for ever."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ended = threading.Event()
        self._lines: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/o/r.git"

    def _serve(self) -> None:
        self._listener.settimeout(0.1)
        while not self._ended.is_set():
            try:
                line, _ = self._listener.accept()
            except TimeoutError:
                self._dribble()
                continue
            line.settimeout(5)
            self._lines.append(line)
            line.recv(65536)
            line.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/x-git-upload-pack-advertisement\r\n"
                b"Content-Length: 100000\r\n\r\n001e# service=git-upload-pack\n0000"
            )

    def _dribble(self) -> None:
        for line in self._lines:
            try:
                line.send(b"0")
            except OSError:
                continue

    def __enter__(self) -> "Dribbler":
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(10)
        for line in [*self._lines, self._listener]:
            line.close()


@pytest.mark.threat("C12")
@pytest.mark.parametrize(
    "budget", [Budget(seconds=60, slow_seconds=2), Budget(seconds=3)], ids=["too slow", "too long"]
)
def test_a_server_that_dribbles_is_given_up(folder: Path, budget: Budget) -> None:
    sources = SourceCache(folder / "state", protocols=PROTOCOLS, run_as=unprivileged_user(), budget=budget)
    begun = time.monotonic()

    with Dribbler() as server, pytest.raises(StepError) as caught:
        sources.resolve(Source(repo_url=server.url, branch="main"))

    assert caught.value.reason is Reason.INTERNAL  # the network's fault, so it is tried again
    assert time.monotonic() - begun < 20
