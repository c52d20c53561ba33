"""Loaded by the fuzzer in its own environment: texts of our formats, and what nobody may be told."""

import contextlib
import json
import os
import re
import zlib
from pathlib import Path

import requests
import schemathesis
from hypothesis import strategies as st

# Short lists: a generator of its own would spend minutes on texts of exactly the longest length.
IMAGES = ["alpine", "alpine:3", "docker://busybox:1", "ghcr.io/owner/name:1.0_rc-1", "localhost:5000/a/b__c"]
IMAGES += [f"owner/name@sha256:{'0' * 64}", "registry.example:443/deep/er/path", "[::1]:5000/name"]
URLS = [
    "https://git.example/owner/name",
    "https://git.example:8443/a/b.git",
    "ssh://git@git.example/owner/name",
]
URLS += ["ssh://git.example:2222/x", "https://192.0.2.1/owner/na%20me", "https://[2001:db8::1]/owner/name"]
BRANCHES = ["main", "feature/one", "v1.0", "ümläut", "a-b_c", "deep/er/still", "x" * 244]

# `hidden`: what belongs to a tenant that whoever asks has nothing to do with. `twins`: for each thing of
# their own, one of that tenant. `known`: what there is to be named in the fields of bodies.
TENANTS = json.loads(Path(os.environ["FUZZ_TENANTS"]).read_text()) if "FUZZ_TENANTS" in os.environ else {}
HIDDEN, TWINS, KNOWN = (TENANTS.get(name, {}) for name in ("hidden", "twins", "known"))
SESSION = requests.Session()
SESSION.trust_env = False
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
ANYTHING = re.compile(r".+")
_ACCOUNT = re.compile(r'("accountId": ?")([^"]*)(")')

schemathesis.openapi.format("docker-reference", st.sampled_from(IMAGES))
schemathesis.openapi.format("uri", st.sampled_from(URLS))
schemathesis.openapi.format("git-branch", st.sampled_from(BRANCHES))


@schemathesis.hook
def map_body(context, body):
    """The fuzzer takes 2.0 for an integer, as the standard of schemas does; here it is written 2."""
    body = _without_fractions(body)
    return _with_known_ids(body) if isinstance(body, dict) else body


@schemathesis.hook
def before_call(_context, case, _kwargs):
    """There is no time to wait for steps that nobody makes, which is what `wait` asks for."""
    wait = case.body.get("wait") if isinstance(case.body, dict) else None
    if type(wait) is int and 0 < wait <= 25:
        case.body["wait"] = 0


def _with_known_ids(body):
    """Every other id that was made up gives way to one of something that there is."""
    for name, values in KNOWN.items():
        made_up = body.get(name)
        if isinstance(made_up, str) and UUID.fullmatch(made_up):
            number = zlib.crc32(made_up.encode())
            if number % 2:
                body[name] = values[number // 2 % len(values)]
    return body


@schemathesis.check
def tells_nothing_of_others(_context, response, _case):
    """Neither a name nor an id nor a secret of the other tenant, but what the request itself has named.

    What was done to one's own things is asked for once more, of those of the other tenant.
    """
    _look_at(response.request, response.content, response.headers)
    if TWINS and response.status_code < 300:
        _ask_for_twins(response.request)


def _ask_for_twins(request):
    url, body = _with_twins(request.url), request.body
    if isinstance(body, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            body = _with_twins(_ACCOUNT.sub(_of_twin, body.decode()), only=UUID).encode()
    if (url, body) == (request.url, request.body):
        return
    headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
    again = SESSION.request(request.method, url, data=body, headers=headers, timeout=20)
    _look_at(again.request, again.content, again.headers)
    is_in_path = url.partition("?")[0] != request.url.partition("?")[0]
    assert not is_in_path or again.status_code >= 400, f"lets in to another tenant: {request.method} {url}"


def _with_twins(text, *, only=ANYTHING):
    """In bodies only ids: a name that reads like the account of others would be stored, and found again."""
    for mine, theirs in TWINS.items():
        if only.fullmatch(mine):
            text = text.replace(mine, theirs)
    return text


def _of_twin(found):
    return found[1] + TWINS.get(found[2], found[2]) + found[3]


def _look_at(request, content, headers):
    told = content.decode("utf-8", "replace") + str(headers)
    found = [word for word in HIDDEN if word in told]
    if not found:
        return
    body = request.body.decode("utf-8", "replace") if isinstance(request.body, bytes) else str(request.body)
    said = f"{request.url} {request.headers} {body}"
    beyond = [word for word in found if word not in said]
    assert not beyond, f"tells of another tenant at {request.method} {request.url}: {beyond[:5]}"


def _without_fractions(value):
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_without_fractions(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_fractions(item) for key, item in value.items()}
    return value
