"""What users may write, and what is refused."""

import os
import subprocess
import time
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.references import (
    ENV_TOTAL_LIMIT,
    ENV_VALUE_LIMIT,
    InvalidReference,
    branch_name,
    commit_hash,
    display_name,
    env_name,
    env_value,
    environment,
    image_reference,
    label,
    repo_url,
    slug,
)

PUBLIC = frozenset({"https", "ssh"})
ALL = frozenset({"https", "ssh", "http", "git", "file"})
DIGEST = "sha256:" + "0123456789abcdef" * 4

# Images


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("alpine", "alpine"),
        ("alpine:3.20", "alpine:3.20"),
        ("docker://alpine:3.20", "alpine:3.20"),
        ("library/python:3.11-slim", "library/python:3.11-slim"),
        ("ghcr.io/o/i:1", "ghcr.io/o/i:1"),
        ("GHCR.io/o/i:Tag_1", "ghcr.io/o/i:Tag_1"),
        ("localhost/x", "localhost/x"),
        ("localhost:5000/x", "localhost:5000/x"),
        ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c"),
        ("[::1]:5000/x", "[::1]:5000/x"),
        ("registry:5000/x:1", "registry:5000/x:1"),
        (f"alpine@{DIGEST}", f"alpine@{DIGEST}"),
        (f"ghcr.io/o/i:1@{DIGEST}", f"ghcr.io/o/i:1@{DIGEST}"),
        ("a--b/c__d/e.f_g", "a--b/c__d/e.f_g"),
        ("a/" + "b" * 253, "a/" + "b" * 253),
        ("a:" + "t" * 128, "a:" + "t" * 128),
    ],
)
def test_an_image_is_a_docker_reference(text: str, canonical: str) -> None:
    assert image_reference(text) == canonical
    assert image_reference(canonical) == canonical


@pytest.mark.threat("B12")
@pytest.mark.threat("B05")
@pytest.mark.parametrize(
    "text",
    [
        "", " ", "alpine; id", "-v/:/h alpine", "--privileged", "-alpine", "alpine\n", " alpine", "alpine ",
        "Alpine", "o/Image", "Foo/bar", "alpine:", "alpine:-t", "alpine:a b", "alpine:" + "t" * 129,
        "alpine@", "alpine@sha256:", "alpine@sha256:abc", f"alpine@{DIGEST}0", f"alpine@{DIGEST[:-1]}",
        f"alpine@{DIGEST.upper()}", "alpine@sha512:" + "0" * 128, "alpine@md5:" + "0" * 32,
        f"alpine@{DIGEST}@{DIGEST}", "a//b", "/a", "a/", "a/./b", "a/../b", "a..b", "a___b", "a._b", "_a",
        "a_", "registry:65536/x", "registry:0/x", "registry:/x", "registry:x/y",
        "host.docker.internal:5000/", "-evil.com/x", "evil-.com/x", "evil..com/x", "[::1%eth0]:5000/x",
        "[::1/x", "[zz]/x", "docker://", "docker://docker://a", "https://ghcr.io/o/i", "user@ghcr.io/o/i",
        "álpine", "a\0b", "a\u202eb", "a" * 256, "0123456789abcdef" * 4, "$(id)", "a`id`", "a|b", "a:b:c",
        "../a", "%2e%2e/a", "a" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_docker_reference_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        image_reference(text)


# Repositories


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("https://github.com/o/r", "https://github.com/o/r"),
        ("https://github.com/o/r.git", "https://github.com/o/r.git"),
        ("HTTPS://GitHub.com:443/O/r/", "https://github.com/O/r"),
        ("https://host:8443/a/b/c/d", "https://host:8443/a/b/c/d"),
        ("https://[2001:DB8::1]:8443/r", "https://[2001:db8::1]:8443/r"),
        ("https://10.0.0.1/r", "https://10.0.0.1/r"),
        ("https://git_server.local/r", "https://git_server.local/r"),
        ("https://dev.azure.com/o/My%20Project/_git/r", "https://dev.azure.com/o/My%20Project/_git/r"),
        ("https://h/a/b::c", "https://h/a/b::c"),
        ("ssh://git@github.com/o/r.git", "ssh://git@github.com/o/r.git"),
        ("ssh://git@github.com:22/o/r", "ssh://git@github.com/o/r"),
        ("ssh://git@ssh.github.com:443/o/r", "ssh://git@ssh.github.com:443/o/r"),
        ("ssh://host/~user/r", "ssh://host/~user/r"),
        ("http://host/r", "http://host/r"),
        ("git://host:9418/r", "git://host/r"),
        ("file:///srv/git/r.git", "file:///srv/git/r.git"),
        ("file:///with%20space/r", "file:///with%20space/r"),
    ],
)
def test_a_repository_is_a_uri(text: str, canonical: str) -> None:
    assert repo_url(text, protocols=ALL) == canonical
    assert repo_url(canonical, protocols=ALL) == canonical


@pytest.mark.parametrize(
    "text", ["http://h/r", "git://h/r", "file:///r", "ftp://h/r", "gopher://h/r", "unix://h/r"]
)
def test_only_the_protocols_of_the_setting_are_allowed(text: str) -> None:
    with pytest.raises(InvalidReference, match="not allowed here"):
        repo_url(text, protocols=PUBLIC)


def test_a_protocol_that_git_would_hand_to_a_program_is_refused_even_if_set() -> None:
    with pytest.raises(InvalidReference):
        repo_url("ext://h/r", protocols=frozenset({"ext"}))


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ("git@github.com:o/r.git", "ssh://git@github.com/o/r.git"),
        ("github.com:o/r", "ssh://git@github.com/o/r"),
        ("me@host.example:/srv/r", "ssh://me@host.example/srv/r"),
    ],
)
def test_the_scp_form_is_refused_with_the_form_to_write(text: str, better: str) -> None:
    with pytest.raises(InvalidReference) as refusal:
        repo_url(text, protocols=PUBLIC)

    assert refusal.value.reason.endswith(f"write {better}")


REFUSED_URLS = {
    "C01": [
        "ext::sh -c touch% /tmp/PWN", "EXT::sh -c x", " ext::sh -c x", "ext::https://h/r", "fd::17",
        "https::https://h/r", "\next::sh",
    ],
    "C02": [
        "/srv/other-tenant.git", "../other", "./other", "C:\\x", "C:/x", "\\\\host\\share", "file://",
        "file:///", "file://host/x", "file://localhost/x", "file:///a/../b", "file:///a/%2e%2e/b",
        "file:///a/./b", "file:a", "file:/a", "file:////host/x", "file:///a//b", "r", "",
    ],
    "C03": [
        "ssh://-oProxyCommand=touch%20/tmp/PWN/x", "git@-oProxyCommand=x:x", "ssh://host/-upload",
        "-oProxyCommand=x:y", "ssh://host/%2dupload", "ssh://host/o/-r", "ssh://-o@host/x",
        "ssh://u@-host/x", "--upload-pack=touch /tmp/PWN", "https://-host/x", "ssh://host:-1/x",
    ],
    "C04": [
        "https://user:pass@host/r", "https://user@host/r", "https://:pass@host/r", "https:///host/x",
        "https://host:22/r", "http://host:22/r", "https://github.com@evil/r",
        "https://github.com:443@evil/r", "ssh://git:pass@host/r", "ssh://a@b@host/r", "ssh://@host/r",
        "https://", "https:///", "https://host", "https://host/", "https:host/r", "https:/host/r",
        "https://host:/r", "https://host:0/r", "https://host:65536/r", "https://host:99999999999/r",
        "https://host:x/r", "https://github.com\\@evil/r", "https://host?@evil/r", "https://host#@evil/r",
        "://host/r",
    ],
    "C05": [
        "https://evil/x%0d%0aHeader:", "https://evil/x%00", "https://evil/x%7f", "https://evil/x%c2%85",
        "https://evil/%zz", "https://evil/x%", "https://evil/%ff", "https://gіthub.com/o/r",
        "https://ｇithub.com/o/r", "https://h/é", "https://[fe80::1%25eth0]/r", "https://[fe80::1%eth0]/r",
        "https://[::1/r", "https://::1/r", "https://[]/r", "https://h/a b", "https://h/r ", " https://h/r",
        "https://h/r\n", "https://h/a\tb", "https://h/a\0b", "https://h/r?x=1", "https://h/r#x",
        "https://h/a/../b", "https://h/%2e%2e/b", "https://h/a/%2E/b", "https://h//r",
        "https://h/a%2f%2e%2e%2fb", "https://h/\ud800", "https://xn--/r-\u202e", "https://h\r\nHost: x/r",
    ],
    "K01": [
        "https://2130706433/r", "https://0x7f.1/r", "https://0/r", "https://127.1/r", "https://0177.0.0.1/r",
        "https://localhost./r", "https://1.2.3.4.5/r", "https://a..b/r", "https://" + "a" * 64 + "/r",
        "https://%61/r",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, marks=pytest.mark.threat(threat))
        for threat, texts in REFUSED_URLS.items()
        for text in [*texts, "https://h/" + "a" * 2048]
    ],
)
def test_what_could_mislead_git_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        repo_url(text, protocols=ALL)


@pytest.mark.threat("C14")
def test_a_password_is_not_repeated_in_the_refusal() -> None:
    for text in ("https://user:hunter2@host/r", "ssh://git:hunter2@host/r", "user:hunter2@host:o/r"):
        with pytest.raises(InvalidReference) as refusal:
            repo_url(text, protocols=PUBLIC)
        assert "hunter2" not in refusal.value.reason


# Commits and branches


@pytest.mark.parametrize("text", ["0123abc", "a" * 40, "b" * 64])
def test_a_commit_is_hex(text: str) -> None:
    assert commit_hash(text) == text


@pytest.mark.threat("B03")
@pytest.mark.threat("C10")
@pytest.mark.parametrize(
    "text",
    [
        "", "abcdef", "a" * 65, "ABCDEF1", "0123abg", "0123abc\n", "-123abc", "HEAD", "HEAD@{1}", ":/msg",
        "٠١٢٣٤٥٦٧", "a\0bcdef",
    ],
)  # fmt: skip
def test_what_is_no_commit_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        commit_hash(text)


@pytest.mark.threat("B02")
@pytest.mark.parametrize(
    "text",
    [
        "main", "feature/x", 'zzz";echo${IFS}"hello";#', "x$({touch,/tmp/PWN})", "a@b", "größe", "a.b",
        "x" * 244, "a-", "{}",
    ],
)  # fmt: skip
def test_a_branch_that_git_accepts_is_legal_however_odd(text: str) -> None:
    assert branch_name(text) == text


@pytest.mark.threat("B03")
@pytest.mark.threat("B04")
@pytest.mark.threat("C10")
@pytest.mark.parametrize(
    "text",
    [
        "", "-x", "--upload-pack=touch /tmp/PWN", "--output=/x", "-c core.pager=x", "a b", "a..b",
        "HEAD@{1}", ":/msg", "a:b", "a~1", "a^", "a?", "a*", "a[b", "a\\b", "a.lock", "a.lock/b", ".a",
        "a/.b", "a/", "/a", "a//b", "a.", "@", "HEAD", "refs/../x", "a\nb", "a\rb", "a\tb", "a\x7f", "a\0b",
        "a\u0085b", "a\u2028b", "a\u2029b", "a\u202eb", "a\ud800", "x" * 245, "é" * 123,
    ],
)  # fmt: skip
def test_what_is_no_branch_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        branch_name(text)


@given(st.text("ab-./@{~^:?*[\\ \t\x7flock", min_size=1, max_size=8))
@settings(max_examples=150, deadline=None)
def test_git_accepts_every_branch_that_we_accept_and_the_reverse(text: str) -> None:
    argv = ["git", "check-ref-format", "--branch", text]
    environ = {**os.environ, "GIT_DIR": "/nonexistent"}
    git_accepts = subprocess.run(argv, env=environ, capture_output=True, timeout=10).returncode == 0

    # A branch may be called @, but git reads that name as HEAD, so we refuse it.
    assert accepts(branch_name, text) == (git_accepts and text != "@")


def accepts(judge: Callable[[str], str], text: str) -> bool:
    try:
        return judge(text) == text
    except InvalidReference:
        return False


# Names


@pytest.mark.threat("B01")
@pytest.mark.parametrize(
    "text",
    [
        "Web shop", "$(touch /tmp/PWN)", "`id`", "a;id", "a&&id", "a|id", ">f", "!!", "~root", "*", "{a,b}",
        "../../x", "con", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "プロジェクト", "é", "e\u0301",
        "a  b",
        "-x", "<script>", "x" * 100,
    ],
)  # fmt: skip
def test_a_name_for_people_may_look_like_shell(text: str) -> None:
    assert display_name(text) == text


@pytest.mark.threat("B04")
@pytest.mark.threat("B05")
@pytest.mark.threat("B11")
@pytest.mark.parametrize(
    "text",
    [
        "", " ", " a", "a ", "\ta", "a\u00a0", "a\nb", "a\r", "a\0b", "a\x1b[31m", "a\x7f", "a\u0085b",
        "a\u2028b", "a\u2029b", "\ud800", "a\udc80",
        *(f"a{chr(c)}b" for c in [*range(0x202A, 0x202F), *range(0x2066, 0x206A)]), "x" * 101, "x" * 10_000,
    ],
)  # fmt: skip
def test_a_name_that_breaks_lines_or_hides_its_order_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        display_name(text)


def test_the_maximum_counts_letters_not_bytes() -> None:
    assert display_name("\U0001f600" * 5, maximum=5)
    with pytest.raises(InvalidReference):
        display_name("\U0001f600" * 6, maximum=5)


@pytest.mark.parametrize("text", ["a", "Python3", "node-20", "team/base_1.2", "9"])
def test_a_slug_is_short_and_plain(text: str) -> None:
    assert slug(text) == text


@pytest.mark.parametrize("text", ["", "-a", "/a", ".a", "_a", "a b", "a\n", "é", "a" * 51, "a:b", "a\0"])
def test_other_slugs_are_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        slug(text)


@pytest.mark.parametrize("text", ["linux", "arch=arm64", "gpu-2", "a.b_c", "1", "a" * 64])
def test_a_label_is_plain(text: str) -> None:
    assert label(text) == text


@pytest.mark.parametrize(
    "text", ["", "Linux", "-a", "a-", "a,b", "a b", "a\n", "a" * 65, "ä", "a" * 64 + "-" * 9]
)
def test_other_labels_are_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        label(text)


# Variables


@pytest.mark.threat("B07")
@pytest.mark.parametrize(
    "text",
    [
        "A", "_x", "PATH", "HOME", "PYTHONPATH", "GIT_SSH_COMMAND", "GIT_CONFIG_COUNT", "DOCKER_HOST", "CI",
        "a" * 256,
    ],
)  # fmt: skip
def test_users_name_their_own_variables(text: str) -> None:
    assert env_name(text) == text


@pytest.mark.threat("B07")
@pytest.mark.threat("B08")
@pytest.mark.parametrize(
    "text",
    [
        "", "A=B", "a b", "1a", "a-b", "A\n", "A\0", "é", "a" * 257, "a" * 65_536, "BUILDMILL_X",
        "BUILDMILL_", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "BASH_ENV", "ENV", "SHELLOPTS",
        "BASHOPTS", "BASH_FUNC_ls%%", "BASH_FUNC_ls", "PS4", "IFS", "PROMPT_COMMAND", "GLIBC_TUNABLES",
        "UID", "OPTIND", "LINENO", "_",
    ],
)  # fmt: skip
def test_names_of_the_loader_the_shell_and_ours_are_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        env_name(text)


@pytest.mark.threat("B04")
@pytest.mark.parametrize("text", ["", "a\nb", "\r\n", "'", "\u202e", "\x01", "x" * ENV_VALUE_LIMIT])
def test_a_value_is_any_text(text: str) -> None:
    assert env_value(text) == text


@pytest.mark.threat("B05")
@pytest.mark.threat("B16")
@pytest.mark.parametrize(
    "text", ["a\0", "\ud800", "x" * (ENV_VALUE_LIMIT + 1), "é" * (ENV_VALUE_LIMIT // 2 + 1)]
)
def test_a_value_that_no_program_can_be_handed_is_refused(text: str) -> None:
    with pytest.raises(InvalidReference):
        env_value(text)


@pytest.mark.threat("B08")
def test_variables_are_limited_together() -> None:
    fits = {f"V{i}": "x" * 1000 for i in range(200)}

    assert environment(fits) == fits
    with pytest.raises(InvalidReference, match="together"):
        environment({f"V{i}": "x" * 1000 for i in range(ENV_TOTAL_LIMIT // 1000)})
    with pytest.raises(InvalidReference):
        environment({"A": "x" * ENV_VALUE_LIMIT})
    with pytest.raises(InvalidReference):
        environment({"A B": "x"})


# All of them

JUDGES: list[Callable[[str], str]] = [
    image_reference, lambda text: repo_url(text, protocols=ALL), commit_hash, branch_name, display_name,
    slug, label, env_name, env_value,
]  # fmt: skip


@given(st.text(max_size=60), st.sampled_from(["", "https://h/", "ssh://", "a/", "git@h:", "docker://"]))
def test_every_judge_accepts_its_own_answer_or_refuses_with_a_reason(text: str, start: str) -> None:
    for judge in JUDGES:
        try:
            canonical = judge(start + text)
        except InvalidReference as refusal:
            assert refusal.reason
        else:
            assert judge(canonical) == canonical


@pytest.mark.threat("D20")
@pytest.mark.parametrize(
    "unit", ["a", "a.", "a-", "-", "_", "a/", "%41", "@", ":", "a:", " ", "::", "é", "["]
)
def test_a_judge_answers_at_once_however_long_the_text(unit: str) -> None:
    for judge in JUDGES:
        for start in ("", "https://", "https://h/", "ssh://a@", "a"):
            began = time.process_time()
            accepts(judge, start + unit * 30_000 + "!")
            assert time.process_time() - began < 2
