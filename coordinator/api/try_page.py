"""A page to try the API by hand: one HTML document with its own style and script, nothing from elsewhere."""

import base64
import hashlib
from importlib.resources import files

_PARTS = files("coordinator.api") / "try_page_parts"
_STYLE = (_PARTS / "page.css").read_text(encoding="utf-8")
_SCRIPT = (_PARTS / "page.js").read_text(encoding="utf-8")


def _source(text: str) -> str:
    """How a content security policy names this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


HTML = (
    (_PARTS / "page.html")
    .read_text(encoding="utf-8")
    .replace("/*style*/", _STYLE)
    .replace("/*script*/", _SCRIPT)
)
# Only the two texts above may run or style; the page may talk to nobody but the server it came from.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src {_source(_SCRIPT)}",
        f"style-src {_source(_STYLE)}",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
