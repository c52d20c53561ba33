import pytest

from runner.executor.verdict import (
    Facts,
    Remedy,
    explain_create,
    explain_pull,
    explain_start,
    find_remedy,
    judge,
    judge_vanished,
    may_pull_again,
)
from shared.reasons import Reason

NO_SHELL = "[FATAL tini (7)] exec /bin/sh failed: No such file or directory"
NOT_EXECUTABLE = "[FATAL tini (7)] exec /bin/sh failed: Permission denied"
CANNOT_FORK = "/buildmill/launch.sh: line 4: can't fork: Resource temporarily unavailable"
NO_SPACE = "/buildmill/launch.sh: line 12: printf: write error: No space left on device"


def test_success_needs_both_codes_to_be_zero() -> None:
    successes = [
        (rc, code) for rc in (None, 0, 1) for code in (None, 0, 1, 137) if judge(Facts(rc, code)).succeeded
    ]

    assert successes == [(0, 0)]


def test_the_script_own_failure_needs_no_further_reason() -> None:
    ended = judge(Facts(rc=3, code=3))

    assert (ended.rc, ended.code, ended.reason) == (3, 3, None)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (Facts(None, 127, launcher_said=NO_SHELL), Reason.NO_SHELL),
        (Facts(None, 126, launcher_said=NOT_EXECUTABLE), Reason.NO_SHELL),
        (Facts(127, 127, launcher_said=""), None),
        (Facts(None, 2, launcher_said=CANNOT_FORK), Reason.BAD_CONFIG),
        (Facts(None, 0, launcher_said=NO_SPACE), Reason.DISK_FULL),
        (Facts(None, 137), Reason.KILLED),
        (Facts(None, 0), Reason.KILLED),
        (Facts(None, None), Reason.KILLED),
        (Facts(0, None), Reason.KILLED),
        (Facts(0, 137), Reason.KILLED),
        (Facts(137, 137), None),
        (Facts(None, 137, oom=True), Reason.OOM),
        (Facts(1, 1, oom=True), Reason.OOM),
        (Facts(137, 137, launcher_said="oom_kill 0\noom_kill 1\n"), Reason.OOM),
        (Facts(137, 137, launcher_said="oom_kill 0\n"), None),
        (Facts(0, 0, oom=True), None),
        (Facts(143, 143, we_asked=True), None),
        (Facts(None, 137, we_asked=True), None),
        (Facts(143, 143), None),
        (Facts(143, 143, engine_broke=True), Reason.DAEMON_ERROR),
        (Facts(None, 137, engine_broke=True), Reason.DAEMON_ERROR),
        (Facts(None, 255, engine_broke=True), Reason.DAEMON_ERROR),
        (Facts(143, 143, engine_broke=True, we_asked=True), None),
        (Facts(8, 8, engine_broke=True), None),
        (Facts(0, 0, engine_broke=True), None),
    ],
)
def test_the_cause_is_told_from_codes_and_texts(facts: Facts, reason: Reason | None) -> None:
    assert judge(facts).reason is reason


def test_a_code_lost_with_the_engine_gives_way_to_what_the_launcher_recorded() -> None:
    assert judge(Facts(0, 255, engine_broke=True)).succeeded
    assert judge(Facts(5, 255, engine_broke=True)).code == 5
    assert not judge(Facts(0, 255)).succeeded


def test_a_vanished_container_never_counts_as_success() -> None:
    assert judge_vanished(None).reason is Reason.CONTAINER_VANISHED
    assert judge_vanished(0).reason is Reason.CONTAINER_VANISHED
    assert judge_vanished(137).reason is Reason.CONTAINER_VANISHED
    assert (judge_vanished(2).reason, judge_vanished(2).code) == (None, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("No such image: nope:1", Reason.IMAGE_NOT_FOUND),
        ("Minimum memory limit allowed is 6MB", Reason.BAD_CONFIG),
        ("Range of CPUs is from 0.01 to 2.00, as there are only 2 CPUs available", Reason.BAD_CONFIG),
        ("the working directory 'rel' is invalid, it needs to be an absolute path", Reason.BAD_CONFIG),
        ("invalid environment variable: =x", Reason.BAD_CONFIG),
        ("Duplicate mount point: /workspace", Reason.BAD_CONFIG),
        ('invalid mount config for type "bind": bind source path does not exist: /x', Reason.INTERNAL),
        ('invalid CapAdd: unknown capability: "CAP_X"', Reason.INTERNAL),
        ("mkdir /var/lib/docker/overlay2/x: no space left on device", Reason.DISK_FULL),
        ("something never seen", Reason.DAEMON_ERROR),
    ],
)
def test_what_the_engine_says_to_create(text: str, reason: Reason) -> None:
    assert explain_create(text) is reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('exec: "/bin/sh": stat /bin/sh: no such file or directory: unknown', Reason.NO_SHELL),
        ("exec /bin/sh: no such file or directory", Reason.NO_SHELL),
        ("exec /sbin/docker-init: exec format error", Reason.NO_SHELL),
        ('exec: "/sbin/docker-init": stat /sbin/docker-init: no such file or directory', Reason.BAD_CONFIG),
        ("unable to find user nobodyhere: no matching entries in passwd file", Reason.BAD_CONFIG),
        ("not a directory: unknown: Are you trying to mount a directory onto a file", Reason.BAD_CONFIG),
        ("error while mounting volume '/v/_data': failed to mount local volume", Reason.DAEMON_ERROR),
        ("error setting rlimit type 7: operation not permitted", Reason.DAEMON_ERROR),
        ("write /run/x: no space left on device", Reason.DISK_FULL),
        ("network nope not found", Reason.DAEMON_ERROR),
    ],
)
def test_what_the_engine_says_to_start(text: str, reason: Reason) -> None:
    assert explain_start(text) is reason


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("No such container: 5f0c", Remedy.NEW_HOLDER),
        ("cannot join network of a non running container: 5f0c", Remedy.NEW_HOLDER),
        ("network nope not found", Remedy.NOTHING),
    ],
)
def test_a_lost_network_is_the_one_thing_that_can_be_helped(text: str, remedy: Remedy) -> None:
    assert find_remedy(text) is remedy


@pytest.mark.parametrize(
    ("text", "reason", "is_transient"),
    [
        ("manifest for localhost:5000/x:1 not found: manifest unknown", Reason.IMAGE_NOT_FOUND, False),
        ("no matching manifest for linux/amd64 in the manifest list entries", Reason.IMAGE_NOT_FOUND, False),
        (
            "pull access denied for nope, repository does not exist or may require 'docker login': denied",
            Reason.IMAGE_DENIED,
            False,
        ),
        (
            "Head https://r/v2/x/manifests/1: unauthorized: authentication required",
            Reason.IMAGE_DENIED,
            False,
        ),
        ("Get https://r/v2/: no basic auth credentials", Reason.IMAGE_DENIED, False),
        ("invalid reference format: repository name must be lowercase", Reason.BAD_CONFIG, False),
        ("Get https://r/v2/: dial tcp: lookup r: no such host", Reason.PULL_NETWORK, True),
        ("dial tcp 127.0.0.1:5001: connect: connection refused", Reason.PULL_NETWORK, True),
        ("net/http: TLS handshake timeout", Reason.PULL_NETWORK, True),
        ("read tcp 10.0.0.1:443: connection reset by peer", Reason.PULL_NETWORK, True),
        ("unexpected EOF", Reason.PULL_NETWORK, True),
        ("received unexpected HTTP status: 503 Service Unavailable", Reason.PULL_NETWORK, True),
        ("toomanyrequests: You have reached your pull rate limit", Reason.PULL_NETWORK, True),
        ("x509: certificate signed by unknown authority", Reason.PULL_NETWORK, False),
        ("http: server gave HTTP response to HTTPS client", Reason.PULL_NETWORK, False),
        ("failed to register layer: write /x: no space left on device", Reason.DISK_FULL, False),
        ("something never seen", Reason.DAEMON_ERROR, False),
    ],
)
def test_what_registries_say_to_a_pull(text: str, reason: Reason, is_transient: bool) -> None:
    assert explain_pull(text) is reason
    assert may_pull_again(text) is is_transient
