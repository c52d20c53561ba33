"""WebSocket frames of text, made once for however many readers they are sent to."""

from collections.abc import Iterator

# The server sends bytes that are frames already, under this name in the extensions of its scope.
EXTENSION = "buildmill.frames"
_TEXT = 0x81
_LONG, _LONGER = 126, 127


def text_frame(text: bytes) -> bytes:
    """One whole message as a server sends it."""
    size = len(text)
    if size < _LONG:
        return bytes((_TEXT, size)) + text
    if size < 2**16:
        return bytes((_TEXT, _LONG)) + size.to_bytes(2, "big") + text
    return bytes((_TEXT, _LONGER)) + size.to_bytes(8, "big") + text


def texts_in(frames: bytes) -> Iterator[str]:
    """The messages of such frames."""
    at = 0
    while at < len(frames):
        size, at = frames[at + 1], at + 2
        if size >= _LONG:
            width = 2 if size == _LONG else 8
            size, at = int.from_bytes(frames[at : at + width], "big"), at + width
        yield frames[at : at + size].decode()
        at += size
