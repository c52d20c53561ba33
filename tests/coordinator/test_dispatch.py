"""From a path to its route: as the framework's own patterns would find it."""

import pytest
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from coordinator.api.dispatch import PathTree
from coordinator.app import ALL_ENDPOINTS


class Answer:
    """Stands for what answers one path."""

    def __init__(self, path: str) -> None:
        self.path = path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError


def a_tree(*paths: str) -> PathTree:
    tree = PathTree()
    for path in paths:
        tree.add(path, Answer(path))
    return tree


def found_in(tree: PathTree, path: str) -> tuple[str, dict[str, str]] | None:
    found = tree.find(path)
    if found is None:
        return None
    assert isinstance(found[0], Answer)
    return found[0].path, dict(found[1])


def test_a_parameter_takes_one_whole_segment() -> None:
    tree = a_tree("/api/builds/{id}", "/api/builds/{id}/steps/{step}")

    assert found_in(tree, "/api/builds/7") == ("/api/builds/{id}", {"id": "7"})
    assert found_in(tree, "/api/builds/7/steps/a b") == (
        "/api/builds/{id}/steps/{step}",
        {"id": "7", "step": "a b"},
    )


@pytest.mark.parametrize(
    "path", ["/", "/api", "/api/builds", "/api/builds/", "/api/builds/7/", "/api/builds/7/steps"]
)
def test_nothing_is_found_where_no_path_ends(path: str) -> None:
    assert found_in(a_tree("/api/builds/{id}", "/api/builds/{id}/steps/{step}"), path) is None


def test_an_id_is_the_same_in_capitals_and_what_is_no_id_stays_as_it_is() -> None:
    tree = a_tree("/r/{id}/secrets/{name}")
    its_id = "0198c0de-7abc-7def-8abc-def012345678"

    assert found_in(tree, f"/r/{its_id.upper()}/secrets/TOKEN") == (
        "/r/{id}/secrets/{name}",
        {"id": its_id, "name": "TOKEN"},
    )
    assert found_in(tree, f"/r/X{its_id.upper()[1:]}/secrets/x") == (
        "/r/{id}/secrets/{name}",
        {"id": f"X{its_id.upper()[1:]}", "name": "x"},
    )


def test_a_word_goes_before_a_parameter_and_a_dead_end_is_left_again() -> None:
    tree = a_tree("/r/{id}", "/r/acquire", "/r/{id}/log")

    assert found_in(tree, "/r/acquire") == ("/r/acquire", {})
    assert found_in(tree, "/r/acquire/log") == ("/r/{id}/log", {"id": "acquire"})
    assert found_in(tree, "/r/other") == ("/r/{id}", {"id": "other"})


def test_one_path_has_one_answer() -> None:
    with pytest.raises(ValueError, match="already"):
        a_tree("/r/{id}", "/r/{name}")


def test_every_route_is_found_as_its_own_pattern_finds_it() -> None:
    paths = list(dict.fromkeys(endpoint.path for endpoint in ALL_ENDPOINTS))
    tree = a_tree(*paths)
    for pattern in paths:
        path = "/".join("x7" if segment.startswith("{") else segment for segment in pattern.split("/"))
        match, scope = Route(pattern, Answer(pattern)).matches(
            {"type": "http", "path": path, "method": "GET"}
        )

        assert match is Match.FULL
        assert found_in(tree, path) == (pattern, scope["path_params"])
