"""A registry on loopback that holds one tiny image, may want a login, and answers badly on demand."""

import base64
import contextlib
import hashlib
import http.server
import io
import json
import random
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def basic(username: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{username}:{password}".encode()).decode()


def a_layer(content: bytes = b"hello") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        entry = tarfile.TarInfo("hello")
        entry.size = len(content)
        tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


KIND = "application/vnd.docker.distribution.manifest.v2+json"


def an_image(layer: bytes) -> tuple[bytes, bytes]:
    """Configuration and manifest of an image that has this one layer."""
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]},
        },
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": KIND,
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "size": len(config),
            "digest": digest_of(config),
        },
        "layers": [
            {
                "mediaType": "application/vnd.docker.image.rootfs.diff.tar",
                "size": len(layer),
                "digest": digest_of(layer),
            },
        ],
    }
    return config, json.dumps(manifest).encode()


class Registry:
    """What it answers for `good/image`; other names have an answer of their own.

    With a `login` it answers nobody else; `challenge` is what it then asks for.
    """

    def __init__(self, login: tuple[str, str] | None = None, challenge: str = 'Basic realm="ours"') -> None:
        self.login = login
        self.challenge = challenge
        self.authorizations: set[str] = set()
        self.layer = a_layer()
        self.config, self.manifest = an_image(self.layer)
        self.kind = KIND
        self.slow_layer = a_layer(random.randbytes(10_000_000))  # one that no engine has yet
        self.slow_config, self.slow_manifest = an_image(self.slow_layer)
        self.trickling = threading.Event()  # somebody is given the slow layer
        self.went_away = threading.Event()  # and has hung up
        self.asked: list[str] = []
        self.gate = threading.Event()

    def lets_in(self, authorization: str | None) -> bool:
        if authorization is not None:
            self.authorizations.add(authorization)
        return self.login is None or authorization == basic(*self.login)

    def answer(self, path: str) -> tuple[int, str, bytes]:
        self.asked.append(path)
        if path == "/v2/":
            return 200, "application/json", b"{}"
        if path.startswith("/v2/good/image/manifests/"):
            return 200, self.kind, self.manifest
        if path.startswith("/v2/trickle/image/manifests/"):
            return 200, self.kind, self.slow_manifest
        for blob in (self.slow_config, self.slow_layer):
            if path == f"/v2/trickle/image/blobs/{digest_of(blob)}":
                return 200, "application/octet-stream", blob
        for blob in (self.config, self.layer):
            if path == f"/v2/good/image/blobs/{digest_of(blob)}":
                return 200, "application/octet-stream", blob
        if path.startswith("/v2/denied/"):
            return 403, "application/json", b'{"errors":[{"code":"DENIED","message":"denied"}]}'
        if path.startswith("/v2/broken/"):
            return 503, "application/json", b"{}"
        if path.startswith("/v2/slow/"):
            self.gate.wait(30)
        return (
            404,
            "application/json",
            b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}',
        )


@contextmanager
def a_registry(**wishes: Any) -> Iterator[tuple[Registry, str]]:
    """The registry and the host part of its images' names."""
    registry = Registry(**wishes)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, kind, content = registry.answer(self.path)
            is_in = registry.lets_in(self.headers.get("Authorization"))
            if not is_in:
                status, kind, content = 401, "application/json", b'{"errors":[{"code":"UNAUTHORIZED"}]}'
            self.send_response(status)
            if not is_in:
                self.send_header("WWW-Authenticate", registry.challenge)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Docker-Content-Digest", digest_of(content))
            self.end_headers()
            if self.command == "GET" and content is registry.slow_layer:
                self.trickle(content)
            elif self.command == "GET":
                self.wfile.write(content)

        def trickle(self, content: bytes) -> None:
            """A little at a time, until the engine goes away or the test is over."""
            with contextlib.suppress(OSError):
                for start in range(0, len(content), 20_000):
                    self.wfile.write(content[start : start + 20_000])
                    self.wfile.flush()
                    registry.trickling.set()
                    if registry.gate.wait(0.1):
                        return
            registry.went_away.set()

        def do_HEAD(self) -> None:
            self.do_GET()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield registry, f"127.0.0.1:{server.server_address[1]}"
    finally:
        registry.gate.set()
        server.shutdown()
        thread.join()
        server.server_close()
