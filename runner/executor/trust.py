"""What steps need of this machine's settings to reach the outside as it does: CAs, proxies, package indexes.

Only handed over when the runner is told to trust steps with it; credentials of package tools are not
searched for, but an index address that carries one is passed as it stands.
"""

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from runner.executor import egress
from runner.executor.base import Bind

# Not over the image's own bundle: a mounted file cannot be replaced, so installing ca-certificates
# would fail.
CA_INSIDE: Final = "/buildmill/ca.crt"
_BUNDLES: Final = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
)
_CA_NAMES: Final = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
    "PIP_CERT",
    "NIX_SSL_CERT_FILE",
    "AWS_CA_BUNDLE",
)
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "FTP_PROXY")
_PASSED: Final = frozenset(
    {*_PROXIES, "NO_PROXY", "GOPROXY", "GOSUMDB", "GONOSUMDB", "GOFLAGS", "COREPACK_NPM_REGISTRY"}
)
_PASSED_STARTS: Final = ("PIP_", "NPM_CONFIG_", "UV_", "YARN_", "CARGO_REGISTRIES_")
_SECRET_WORDS: Final = ("TOKEN", "PASSWORD", "SECRET", "_AUTH", "KEY")
_FOLDERS: Final = frozenset({"PIP_FIND_LINKS", "UV_FIND_LINKS"})
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_APT_LIMIT: Final = 20


@dataclass(frozen=True)
class HostTrust:
    """Variables and files to hand over, and what must be let through for them."""

    env: Mapping[str, str]
    binds: tuple[Bind, ...] = ()
    endpoints: tuple[egress.Endpoint, ...] = ()
    notes: tuple[str, ...] = ()


def gather(environ: Mapping[str, str], *, scratch: Path, root: Path = Path("/")) -> HostTrust:
    """Read this machine's settings; `scratch` keeps the small files made for the steps."""
    scratch.mkdir(parents=True, exist_ok=True)
    env, binds = _pass_variables(environ)
    bundle = _find_bundle(environ, root)
    if bundle is not None:
        env |= dict.fromkeys(_CA_NAMES, CA_INSIDE)
        binds.append(Bind(bundle, CA_INSIDE, read_only=True))
        env["WGETRC"] = "/buildmill/wgetrc"
        wgetrc = _write(scratch / "wgetrc", f"ca_certificate = {CA_INSIDE}\n")
        binds.append(Bind(wgetrc, "/buildmill/wgetrc", read_only=True))
    binds += _pip_files(environ, root)
    binds += _apt_files(root, scratch, has_bundle=bundle is not None)
    endpoints, notes = _find_endpoints(env)
    return HostTrust(env=env, binds=tuple(binds), endpoints=endpoints, notes=notes)


def _pass_variables(environ: Mapping[str, str]) -> tuple[dict[str, str], list[Bind]]:
    env: dict[str, str] = {}
    binds: list[Bind] = []
    for name, value in sorted(environ.items()):
        if name in _FOLDERS and value.startswith("/"):
            if Path(value).is_dir():
                env[name] = value
                binds.append(Bind(Path(value), value, read_only=True))
        elif _is_passed(name) and not value.startswith(
            ("/", "~")
        ):  # a path of this machine means nothing inside
            env[name] = value
    return env, binds


def _is_passed(name: str) -> bool:
    upper = name.upper()  # proxies and npm's settings are also spelled small
    if any(word in upper for word in _SECRET_WORDS):
        return False
    return upper in _PASSED or upper.startswith(_PASSED_STARTS)


def _find_bundle(environ: Mapping[str, str], root: Path) -> Path | None:
    named = environ.get("SSL_CERT_FILE", "")
    candidates = [Path(named)] if named else []
    candidates += [root / path.lstrip("/") for path in _BUNDLES]
    return next((path.resolve() for path in candidates if path.is_file()), None)


def _pip_files(environ: Mapping[str, str], root: Path) -> list[Bind]:
    places = [(root / "etc/pip.conf", "/etc/pip.conf")]
    home = environ.get("HOME")
    if home:
        places.append((Path(home) / ".config/pip/pip.conf", "/root/.config/pip/pip.conf"))
    return [Bind(path, target, read_only=True) for path, target in places if path.is_file()]


def _apt_files(root: Path, scratch: Path, *, has_bundle: bool) -> list[Bind]:
    """Settings of how apt fetches; those that run programs of this machine stay here."""
    folder = root / "etc/apt/apt.conf.d"
    binds = []
    for path in sorted(folder.iterdir())[:200] if folder.is_dir() else []:
        if path.is_file() and _only_says_how_to_fetch(path):
            binds.append(Bind(path.resolve(), f"/etc/apt/apt.conf.d/{path.name}", read_only=True))
    if has_bundle:
        text = f'Acquire::https::CAInfo "{CA_INSIDE}";\n'
        ours = _write(scratch / "apt.conf", text)
        binds.append(Bind(ours, "/etc/apt/apt.conf.d/98buildmill", read_only=True))
    return binds[-_APT_LIMIT:]


def _only_says_how_to_fetch(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")[:65536].lower()
    return "acquire::" in text and not any(
        word in text for word in ("invoke", "hook", "pre-install", "/usr/")
    )


def _find_endpoints(env: Mapping[str, str]) -> tuple[tuple[egress.Endpoint, ...], tuple[str, ...]]:
    found: set[egress.Endpoint] = set()
    notes = []
    for host, port in sorted(_addresses_in(env.values())):
        for address in _resolve(host):
            if address.startswith("127."):
                notes.append(
                    f"{host}:{port} is this machine's own loopback, which steps in containers cannot reach"
                )
            elif egress.is_refused_by_default(address):
                found.add(egress.Endpoint(address, port))
    return tuple(sorted(found)), tuple(notes)


def _addresses_in(values: Iterable[str]) -> set[tuple[str, int]]:
    found = set()
    for value in values:
        for word in value.replace(",", " ").replace("|", " ").split()[:20]:
            try:
                parts = urlsplit(word)
                port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
            except ValueError:
                continue
            if parts.hostname and port:
                found.add((parts.hostname, port))
    return found


def _resolve(host: str) -> set[str]:
    try:
        answers = socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {str(answer[4][0]) for answer in answers}


def _write(path: Path, text: str) -> Path:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    return path
