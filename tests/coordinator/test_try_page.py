"""The page to try the API brings everything with it and lets nothing else in."""

import base64
import hashlib
import re
from html.parser import HTMLParser

import httpx
import pytest

from coordinator.api import try_page
from tests.factories import ON_SQLITE


class Parts(HTMLParser):
    """What the page's styles and scripts hold, and every address it names."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = ""
        self.texts: dict[str, list[str]] = {"style": [], "script": []}
        self.addresses: list[str] = []
        self.inline_attributes: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.inside = tag if tag in self.texts else ""
        if self.inside:
            self.texts[tag].append("")
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action")]
        self.inline_attributes += [name for name, _ in attributes if name == "style" or name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside][-1] += data


@pytest.fixture
def page(client: httpx.Client) -> httpx.Response:
    answer = client.get("/docs")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    return answer


def parts_of(page: httpx.Response) -> Parts:
    parts = Parts()
    parts.feed(page.text)
    parts.close()
    return parts


@ON_SQLITE
def test_only_the_page_s_own_script_and_style_may_run(page: httpx.Response) -> None:
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    parts = parts_of(page)

    for tag, directive in (("script", "script-src"), ("style", "style-src")):
        digests = [
            base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in parts.texts[tag]
        ]
        assert policy[directive] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert parts.inline_attributes == []


@ON_SQLITE
def test_the_page_names_no_other_host(page: httpx.Response) -> None:
    assert parts_of(page).addresses == ["/openapi.json"]
    assert re.findall(r"(?:https?:)?//[a-z]", page.text) == []


def test_the_script_puts_no_text_into_the_page_as_markup() -> None:
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|localStorage"

    assert re.findall(forbidden, try_page.HTML) == []
