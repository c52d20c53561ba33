"""Loaded by the fuzzer in its own environment: what texts of our formats look like."""

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

schemathesis.openapi.format("docker-reference", st.sampled_from(IMAGES))
schemathesis.openapi.format("uri", st.sampled_from(URLS))
schemathesis.openapi.format("git-branch", st.sampled_from(BRANCHES))


@schemathesis.hook
def map_body(context, body):
    """The fuzzer takes 2.0 for an integer, as the standard of schemas does; here it is written 2.

    Nor does it have the time to wait for steps that nobody makes, which is what `wait` asks for.
    """
    body = _without_fractions(body)
    if isinstance(body, dict) and isinstance(body.get("wait"), int) and 0 < body["wait"] <= 25:
        body["wait"] = 0
    return body


def _without_fractions(value):
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_without_fractions(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_fractions(item) for key, item in value.items()}
    return value
