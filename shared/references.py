"""What users may write as a name, an address or a variable; the only judge of such text.

Each function returns the one canonical form of what it was given or raises InvalidReference.
None of them asks the outside world, and all take time linear in the text.
"""

import ipaddress
import re
import unicodedata
from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

ENV_VALUE_LIMIT = 128 * 1024 - 1  # the longest string that Linux hands to a program
ENV_TOTAL_LIMIT = 256 * 1024
SECRET_VALUE_LIMIT = 64 * 1024
SECRETS_TOTAL_LIMIT = 64 * 1024  # of one step: masking takes time and memory for each byte of them
_ENV_NAME_LIMIT = 256
_BRANCH_LIMIT = 244
_URL_LIMIT = 2048
_IMAGE_PATH_LIMIT = 255
_IMAGE_LIMIT = 1024
_SLUG_LIMIT = 50
_LABEL_LIMIT = 64


class InvalidReference(ValueError):
    """What a user wrote is not a legal name, address or path."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# Images

_REGISTRY_HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_IMAGE_PATH_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_{1,2}|-+)[a-z0-9]+)*")
_IMAGE_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_IMAGE_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_IMAGE_ID = re.compile(r"[0-9a-f]{64}")


def image_reference(text: str) -> str:
    """Accept a Docker reference, with or without `docker://` before it, and return it without."""
    _refuse_longer("the image", text, _IMAGE_LIMIT)
    _refuse_unless_ascii("the image", text)
    name, has_digest, digest = plain_image(text).partition("@")
    if has_digest and not _IMAGE_DIGEST.fullmatch(digest):
        raise InvalidReference("the digest of the image must be sha256: and 64 lower-case hex digits")
    registry, path = _split_registry(name)
    path, has_tag, tag = path.partition(":")
    if has_tag and not _IMAGE_TAG.fullmatch(tag):
        raise InvalidReference(f"{tag!r} is no tag of an image")
    if len(path) > _IMAGE_PATH_LIMIT:
        raise InvalidReference(f"the path of the image is longer than {_IMAGE_PATH_LIMIT} letters")
    if not all(_IMAGE_PATH_PART.fullmatch(part) for part in path.split("/")):
        raise InvalidReference(
            f"{path!r} is no path of an image: lower-case letters and digits, separated by . _ __ - or /"
        )
    if not registry and _IMAGE_ID.fullmatch(path):
        raise InvalidReference("64 hex digits are the id of an image, not its name")
    return f"{registry}{path}{has_tag}{tag}{has_digest}{digest}"


def plain_image(text: str) -> str:
    """A reference that was accepted, as the engine takes it: without the `docker://` before it."""
    return text.removeprefix("docker://")


def _split_registry(name: str) -> tuple[str, str]:
    """Tell `registry/` from the path behind it, the way Docker does."""
    first, slash, rest = name.partition("/")
    if not slash or not ("." in first or ":" in first or first.lower() == "localhost"):
        return "", name
    host, port = _split_port(first.lower(), "the registry of the image")
    if host.startswith("["):
        host = _ip6("the registry of the image", host)
    elif not _REGISTRY_HOST.fullmatch(host):
        raise InvalidReference(f"{first!r} is no registry")
    return f"{host}{'' if port is None else f':{port}'}/", rest


# Repositories

_KNOWN_SCHEMES = {"https": 443, "http": 80, "ssh": 22, "git": 9418, "file": None}
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_TRANSPORT_HELPER = re.compile(r"\s*[A-Za-z][A-Za-z0-9+.-]*::.*", re.DOTALL)
_SCP_FORM = re.compile(r"(?:([^\s/@:]+)@)?([^\s/@:]+):/?([^\s/@][^\s@]*)")
_SSH_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
_HOST_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?")
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")
_PORT = re.compile(r"[0-9]{1,5}")
_BARE_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_NOT_IN_A_PATH = re.compile(r"[\s\"<>\\^`{|}?#\[\]]")


def repo_url(text: str, *, protocols: frozenset[str]) -> str:
    """Accept the URI of a repository whose scheme is among `protocols`."""
    _refuse_longer("the repository's URL", text, _URL_LIMIT)
    if _TRANSPORT_HELPER.fullmatch(text):
        raise InvalidReference("transport helpers (name::address) are refused")
    _refuse_unless_ascii("the repository's URL", text)
    scheme, has_scheme, rest = text.partition("://")
    if not has_scheme or not _SCHEME.fullmatch(scheme):
        raise InvalidReference(_why_no_uri(text))
    scheme = scheme.lower()
    if scheme not in protocols or scheme not in _KNOWN_SCHEMES:
        allowed = ", ".join(sorted(protocols & _KNOWN_SCHEMES.keys()))
        raise InvalidReference(f"a repository by {scheme} is not allowed here (allowed: {allowed})")
    authority, slash, path = rest.partition("/")
    authority = _authority(scheme, authority)
    return f"{scheme}://{authority}/{_repo_path(slash + path)}"


def _why_no_uri(text: str) -> str:
    scp = _SCP_FORM.fullmatch(text)
    if scp:
        user, host, path = scp.groups()
        try:
            better = repo_url(f"ssh://{user or 'git'}@{host}/{path}", protocols=frozenset({"ssh"}))
        except InvalidReference:
            return "the repository must be a URI such as https://host/owner/name"
        return f"the repository must be a URI: write {better}"
    return "the repository must be a URI such as https://host/owner/name"


def _authority(scheme: str, authority: str) -> str:
    if scheme == "file":
        if authority:
            raise InvalidReference("a file URL names no host: write file:///path")
        return ""
    user, at, address = authority.rpartition("@")
    if at and scheme != "ssh":
        raise InvalidReference(f"no user and no password may stand in a URL by {scheme}")
    if ":" in user:
        raise InvalidReference("no password may stand in a URL")
    if at and not _SSH_USER.fullmatch(user):
        raise InvalidReference(f"{user!r} is no user name")
    host, port = _split_port(address.lower(), "the repository's host")
    host = _ip6("the repository's host", host) if host.startswith("[") else _host(host)
    if port == 22 and scheme != "ssh":
        raise InvalidReference(f"port 22 does not speak {scheme}")
    shown_port = "" if port is None or port == _KNOWN_SCHEMES[scheme] else f":{port}"
    return f"{user}{at}{host}{shown_port}"


def _host(host: str) -> str:
    labels = host.split(".")
    if not host:
        raise InvalidReference("the repository's URL names no host")
    if len(host) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise InvalidReference(f"{host!r} is no host name")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError as error:
            raise InvalidReference(f"{host!r} is neither a host name nor an address") from error
    return host


def _repo_path(path: str) -> str:
    """Return the path without the slashes around it."""
    if _NOT_IN_A_PATH.search(path) or _BARE_PERCENT.search(path):
        raise InvalidReference("the path of the repository holds a character that must be percent-encoded")
    try:
        decoded = unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidReference("the path of the repository is not valid UTF-8") from error
    refuse_unshowable("the path of the repository", decoded)
    parts = decoded.removeprefix("/").removesuffix("/").split("/")
    if parts == [""]:
        raise InvalidReference("the repository's URL has no path")
    if any(part in ("", ".", "..") for part in parts):
        raise InvalidReference("the path of the repository must not hold empty, . or .. segments")
    if any(part.startswith("-") for part in parts):
        raise InvalidReference("no segment of the repository's path may start with a hyphen")
    return path.removeprefix("/").removesuffix("/")


def _split_port(address: str, what: str) -> tuple[str, int | None]:
    host, colon, port = address, "", ""
    if ":" in address.rpartition("]")[2]:
        host, colon, port = address.rpartition(":")
    if not colon:
        return host, None
    if not _PORT.fullmatch(port) or not 1 <= int(port) <= 65535:
        raise InvalidReference(f"the port of {what} must be a number from 1 to 65535")
    return host, int(port)


def _ip6(what: str, host: str) -> str:
    if "%" in host or not host.endswith("]"):
        raise InvalidReference(f"{what} must be [address] without a zone")
    try:
        return f"[{ipaddress.IPv6Address(host[1:-1])}]"
    except ValueError as error:
        raise InvalidReference(f"{host!r} is no IPv6 address") from error


# Commits and branches

_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_NOT_IN_A_BRANCH = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//")


def commit_hash(text: str) -> str:
    """Accept a whole or abbreviated commit hash."""
    if not _COMMIT.fullmatch(text):
        raise InvalidReference("a commit is 7 to 64 lower-case hex digits")
    return text


def branch_name(text: str, *, longest: int = _BRANCH_LIMIT) -> str:
    """Accept what git accepts as the name of a branch, however odd it looks; `longest` counts bytes."""
    refuse_unshowable("the branch", text)
    if not text or len(text.encode("utf-8")) > longest:
        raise InvalidReference(f"the name of a branch is 1 to {longest} bytes long")
    if text.startswith("-"):
        raise InvalidReference("the name of a branch must not start with a hyphen")
    if text in ("@", "HEAD"):
        raise InvalidReference(f"{text} is not the name of a branch")
    found = _NOT_IN_A_BRANCH.search(text)
    if found:
        raise InvalidReference(f"the name of a branch must not hold {found.group()!r}")
    if text.startswith("/") or text.endswith((".", "/")):
        raise InvalidReference("the name of a branch must not end with a dot, nor start or end with a slash")
    if any(part.startswith(".") or part.endswith(".lock") for part in text.split("/")):
        raise InvalidReference("no part of a branch's name may start with a dot or end with .lock")
    return text


# Names

_SLUG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9._=-]*[a-z0-9])?")
_BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_UNSHOWABLE = frozenset({"Cc", "Cs", "Zl", "Zp"})


def display_name(text: str, *, maximum: int = 100) -> str:
    """Accept a name that people read; it may look like shell, since it never reaches one."""
    if not 1 <= len(text) <= maximum:
        raise InvalidReference(f"a name is 1 to {maximum} letters long")
    refuse_unshowable("the name", text)
    if text != text.strip():
        raise InvalidReference("a name must not start or end with a space")
    return text


def slug(text: str) -> str:
    """Accept the short name of an image."""
    if len(text) > _SLUG_LIMIT or not _SLUG.fullmatch(text):
        raise InvalidReference(
            f"a slug is 1 to {_SLUG_LIMIT} letters, digits, dots, underscores, slashes or hyphens"
            " and starts with a letter or digit"
        )
    return text


def label(text: str) -> str:
    """Accept a label that tells runners apart."""
    if len(text) > _LABEL_LIMIT or not _LABEL.fullmatch(text):
        raise InvalidReference(
            f"a label is 1 to {_LABEL_LIMIT} lower-case letters, digits, dots, underscores, equals signs or"
            " hyphens and starts and ends with a letter or digit"
        )
    return text


# Variables

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOADER_AND_SHELL = frozenset(
    {"BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS", "PS4", "IFS", "PROMPT_COMMAND", "GLIBC_TUNABLES"}
)
# A shell overwrites, ignores or chokes on these, so their value would never arrive.
_KEPT_BY_THE_SHELL = frozenset(
    {"_", "BASHPID", "BASH_ARGV0", "BASH_VERSINFO", "BASH_XTRACEFD", "DIRSTACK", "EPOCHREALTIME"}
    | {"EPOCHSECONDS", "EUID", "FUNCNAME", "GROUPS", "LINENO", "OPTIND", "PPID", "RANDOM", "SECONDS"}
    | {"SRANDOM", "UID"}
)


def env_name(text: str) -> str:
    """Accept the name of a variable that a user gives to a step."""
    if len(text) > _ENV_NAME_LIMIT or not _ENV_NAME.fullmatch(text):
        raise InvalidReference(
            f"the name of a variable is 1 to {_ENV_NAME_LIMIT} letters, digits or underscores"
            " and does not start with a digit"
        )
    if text.startswith("BUILDMILL_"):
        raise InvalidReference(f"{text}: names that start with BUILDMILL_ are reserved")
    if text in _LOADER_AND_SHELL or text.startswith(("LD_", "BASH_FUNC_")):
        raise InvalidReference(f"{text} would change what the loader or the shell itself does")
    if text in _KEPT_BY_THE_SHELL:
        raise InvalidReference(f"{text} is a name that shells keep for themselves")
    return text


def env_value(text: str) -> str:
    """Accept the value of a variable: any text that a program can be handed."""
    if "\0" in text:
        raise InvalidReference("the value of a variable must not hold NUL")
    if len(_encoded("the value of a variable", text)) > ENV_VALUE_LIMIT:
        raise InvalidReference(f"the value of a variable is longer than {ENV_VALUE_LIMIT} bytes")
    return text


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Accept all variables of a step, each by itself and all of them together."""
    accepted = {env_name(name): env_value(value) for name, value in variables.items()}
    sizes = [len(name) + len(value.encode("utf-8")) + 1 for name, value in accepted.items()]
    if max(sizes, default=0) > ENV_VALUE_LIMIT:
        raise InvalidReference(f"a variable and its name are longer than {ENV_VALUE_LIMIT} bytes")
    if sum(sizes) > ENV_TOTAL_LIMIT:
        raise InvalidReference(f"the variables are longer than {ENV_TOTAL_LIMIT} bytes together")
    return accepted


_SECRET_NAME = re.compile(r"[A-Z_][A-Z0-9_]{0,63}")
# Ours, and set behind the secrets.
_SET_BY_THE_SCRIPT = frozenset({"CI"})


def secret_name(text: str) -> str:
    """Accept the name of a secret, which is also the variable that holds it; a refusal never repeats it."""
    if not _SECRET_NAME.fullmatch(text):
        raise InvalidReference(
            "the name of a secret is 1 to 64 upper-case letters, digits or underscores"
            " and does not start with a digit"
        )
    if text in _SET_BY_THE_SCRIPT:
        raise InvalidReference("this name is a variable that every step is given")
    try:
        return env_name(text)
    except InvalidReference as error:
        raise InvalidReference("a secret cannot have the name of a variable that is reserved") from error


def secret_value(text: str) -> str:
    """Accept the value of a secret; a refusal never repeats any of it."""
    size = len(_encoded("the value of a secret", text))
    if "\0" in text:
        raise InvalidReference("the value of a secret must not hold NUL")
    if not 1 <= size <= SECRET_VALUE_LIMIT:
        raise InvalidReference(f"the value of a secret is 1 to {SECRET_VALUE_LIMIT} bytes long")
    return text


def refuse_unshowable(what: str, text: str) -> None:
    """Refuse what breaks a line or turns its direction, and what is no text at all."""
    for character in text:
        if character in _BIDI_CONTROLS or unicodedata.category(character) in _UNSHOWABLE:
            raise InvalidReference(f"{what} must not hold the character U+{ord(character):04X}")


def _refuse_unless_ascii(what: str, text: str) -> None:
    if not text.isascii() or not text.isprintable() or " " in text:
        raise InvalidReference(f"{what} must be printable ASCII without spaces")


def _refuse_longer(what: str, text: str, limit: int) -> None:
    if len(text) > limit:
        raise InvalidReference(f"{what} is longer than {limit} letters")


def _encoded(what: str, text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidReference(f"{what} is not valid UTF-8") from error
