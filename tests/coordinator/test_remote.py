"""What the command that follows a build prints of what the coordinator says."""

import httpx
import pytest

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
