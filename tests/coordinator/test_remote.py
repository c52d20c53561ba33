"""What the command that follows a build prints of what the coordinator says."""

from typing import Any

import httpx
import pytest

from coordinator.cli import remote
from coordinator.cli.remote import Watcher

STEP = {"id": "the-step", "name": "test"}
PIECES = [
    b'id: 1:3\nevent: log\ndata: {"offset": 0, "text": "one"}\n\n',
    b'id: 2:0\nevent: attempt\ndata: {"attempt": 2}\n\n'
    b'id: 2:4\nevent: log\ndata: {"offset": 0, "text": "two\\n"}\n\n'
    b'id: 2:4\nevent: end\ndata: {"size": 4}\n\n',
]


def test_a_new_attempt_is_told_apart_and_a_lost_stream_goes_on_where_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str | None] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("last-event-id"))
        return httpx.Response(200, content=PIECES[len(asked) - 1])

    with httpx.Client(base_url="http://coordinator", transport=httpx.MockTransport(answer)) as client:
        Watcher(client, "the-build")._show_log(STEP)

    shown = [line.partition("| ")[2] for line in capsys.readouterr().out.splitlines()]
    assert shown == ["one", "attempt 2 begins anew", "two"]
    assert asked == [None, "1:3"]


def a_build(round_number: int, status: str, steps: list[tuple[str, str, str]]) -> dict[str, Any]:
    """As the coordinator shows it; of each step its id, its name and its status."""
    shown = [
        {"id": step_id, "name": name, "status": said, "dependsOn": [], "attempt": 1}
        for step_id, name, said in steps
    ]
    return {"number": 7, "round": round_number, "status": status, "steps": shown}


def test_a_build_that_is_retried_is_followed_into_its_new_round(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "POLL_S", 0)
    looks = [
        a_build(1, "RUNNING", [("1", "test", "FAILED"), ("2", "other", "RUNNING")]),
        a_build(2, "RUNNING", [("3", "test", "PENDING"), ("2", "other", "RUNNING")]),
        a_build(2, "SUCCESS", [("3", "test", "SUCCESS"), ("2", "other", "SUCCESS")]),
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=looks.pop(0))

    with httpx.Client(base_url="http://coordinator", transport=httpx.MockTransport(answer)) as client:
        succeeded = Watcher(client, "the-build", show_logs=False).run()

    assert succeeded
    assert capsys.readouterr().out.splitlines() == [
        "build 7: [test | other]",
        "x>  test: FAILED",
        "x>  other: RUNNING",
        "build 7 round 2: [test | other]",
        "++  test: SUCCESS",
        "++  other: SUCCESS",
        "build 7 round 2 SUCCESS",
    ]
