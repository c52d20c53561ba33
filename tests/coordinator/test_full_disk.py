"""A disk without room is a reason to ask again later, not a fault of the program."""

import errno
import hashlib
import os
from typing import Any

import pytest

from coordinator.store.full_disk import disk_may_be_full
from tests.factories import ON_SQLITE, Api

DATA = b"the bytes of an output" * 10
SHA = hashlib.sha256(DATA).hexdigest()

AT_FAULT = [
    pytest.param("write", errno.ENOSPC, "the coordinator's disk is full", id="full"),
    pytest.param("write", errno.EDQUOT, "the coordinator's disk is full", id="quota"),
    pytest.param("fsync", errno.EIO, "the coordinator's disk fails", id="broken"),
]


def fail_with(patch: pytest.MonkeyPatch, call: str, number: int, below: str) -> None:
    """From now on `call` fails, for files whose path holds `below`."""
    really = getattr(os, call)

    def fail(descriptor: int, *more: Any) -> Any:
        if below in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        return really(descriptor, *more)

    patch.setattr(os, call, fail)


@ON_SQLITE
@pytest.mark.parametrize(("call", "number", "sentence"), AT_FAULT)
def test_a_blob_that_finds_no_room_may_be_sent_again(
    api: Api, monkeypatch: pytest.MonkeyPatch, call: str, number: int, sentence: str
) -> None:
    held = api.a_running_step()

    with monkeypatch.context() as patch:
        fail_with(patch, call, number, "/blobs/")
        answer = held.put_blob(SHA, DATA)

    assert (answer.status_code, answer.json()["error"]) == (503, sentence)
    assert answer.headers["retry-after"] == "1"
    assert held.put_blob(SHA, DATA).status_code == 201


@ON_SQLITE
def test_a_log_that_finds_no_room_may_be_sent_again(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    held = api.a_running_step()

    with monkeypatch.context() as patch:
        fail_with(patch, "pwrite", errno.ENOSPC, "/logs/")
        answer = held.append(0, b"hello\n")

    assert (answer.status_code, answer.json()["error"]) == (503, "the coordinator's disk is full")
    assert held.append(0, b"hello\n").status_code == 200


@ON_SQLITE
def test_a_log_that_cannot_be_sealed_may_be_completed_again(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = api.a_running_step()
    held.append(0, b"hello\n")

    with monkeypatch.context() as patch:
        fail_with(patch, "fsync", errno.EIO, "/logs/")
        answer = held.complete(logSize=6)

    assert (answer.status_code, answer.json()["error"]) == (503, "the coordinator's disk fails")
    assert held.complete(logSize=6).status_code == 200


def test_what_is_no_fault_of_the_disk_stays_what_it_is() -> None:
    with pytest.raises(PermissionError), disk_may_be_full():
        raise PermissionError(errno.EACCES, "no")
