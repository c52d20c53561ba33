"""From the path of a request to the route that answers it.

The framework tries one pattern after the other, which costs more than the answer where there are dozens.
Here the segments of a path lead down a tree; the routes and the words for their parameters stay the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from shared.ids import canonical_id


class PathTree:
    """Paths such as `/api/builds/{id}`; a parameter is one whole segment, and never empty."""

    def __init__(self) -> None:
        self._root = _Node()

    def add(self, path: str, app: ASGIApp) -> None:
        node, names = self._root, []
        for segment in path.split("/")[1:]:
            if segment.startswith("{"):
                names.append(segment.strip("{}"))
                node.any = node = node.any or _Node()
            elif "{" in segment:
                raise ValueError(f"{path}: a parameter is a whole segment")
            else:
                node = node.words.setdefault(segment, _Node())
        if node.app is not None:
            raise ValueError(f"{path}: there is such a path already")
        node.app, node.names = app, tuple(names)

    def find(self, path: str) -> tuple[ASGIApp, Mapping[str, str]] | None:
        """What answers this path, and the values of its parameters; a word goes before a parameter.

        An id means the same in small letters and in capitals, as it does in bodies.
        """
        values: list[str] = []
        node = _descend(self._root, path.split("/"), 1, values)
        if node is None or node.app is None:
            return None
        return node.app, dict(zip(node.names, map(canonical_id, values), strict=True))


class _Node:
    __slots__ = ("any", "app", "names", "words")

    def __init__(self) -> None:
        self.words: dict[str, _Node] = {}
        self.any: _Node | None = None
        self.app: ASGIApp | None = None
        self.names: tuple[str, ...] = ()


def _descend(node: _Node, segments: Sequence[str], at: int, values: list[str]) -> _Node | None:
    if at == len(segments):
        return node if node.app is not None else None
    word = node.words.get(segments[at])
    if word is not None:
        found = _descend(word, segments, at + 1, values)
        if found is not None:
            return found
    if node.any is None or not segments[at]:
        return None
    values.append(segments[at])
    found = _descend(node.any, segments, at + 1, values)
    if found is None:
        values.pop()
    return found


class TreeRouter(Router):
    """The framework's router, with trees in front of its patterns: one for requests, one for WebSockets."""

    def __init__(
        self,
        routes: Sequence[Route],
        *,
        default: ASGIApp,
        lifespan: Any,
        sockets: Mapping[str, ASGIApp] | None = None,
    ) -> None:
        super().__init__(routes, redirect_slashes=False, default=default, lifespan=lifespan)
        self._trees = {"http": PathTree(), "websocket": PathTree()}
        for route in routes:
            self._trees["http"].add(route.path, route.app)
        for path, app in (sockets or {}).items():
            self._trees["websocket"].add(path, app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tree = self._trees.get(scope["type"])
        if tree is None:
            await super().__call__(scope, receive, send)
            return
        found = tree.find(scope["path"])
        if found is None:
            await self.default(scope, receive, send)
            return
        app, scope["path_params"] = found
        await app(scope, receive, send)


class Application(Starlette):
    """The framework's application without its own layers of error handling: every route has its own."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = self.router
        for layer, arguments, options in reversed(self.user_middleware):
            app = layer(app, *arguments, **options)
        return app
