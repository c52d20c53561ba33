"""The log of a build as a WebSocket: from a position to its end, one message a frame."""

from collections.abc import AsyncIterator

from coordinator.actions.read_build_log import show_build_log
from coordinator.api.executions.log_feed import LogFeeds
from coordinator.api.executions.log_routes import READ, STREAM_PATH
from coordinator.api.executions.log_shapes import StreamQuery
from coordinator.api.executions.operations import PREFIX
from coordinator.api.executions.problems import executions_form
from coordinator.api.state import AppState
from coordinator.api.websockets import Opening, Socket, Stream


class LogStream(Stream):
    """Everybody who follows a build here shares its feed."""

    def __init__(self, state: AppState) -> None:
        self._feeds = LogFeeds(state)

    async def open(self, opening: Opening) -> AsyncIterator[bytes]:
        query: StreamQuery = opening.query
        build_id = opening.path["id"]
        await opening.read(show_build_log, opening.caller, build_id)
        return self._feeds.follow(build_id, query.start)


SOCKETS = [Socket(PREFIX + STREAM_PATH, READ, StreamQuery, LogStream, executions_form)]
