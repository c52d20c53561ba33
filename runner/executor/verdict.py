"""How an attempt ended, decided from codes and texts alone: the only place that reads the engine's words."""

import re
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Final

from runner.executor.base import Ended
from shared.reasons import Reason

KILLED_CODE: Final = 137
TERMINATED_CODE: Final = 143
UNKNOWN_CODE: Final = 255  # what an engine says that missed the end
NO_EXEC_CODES: Final = frozenset({126, 127})
SUSPICIOUS_CODES: Final = frozenset({KILLED_CODE, TERMINATED_CODE, UNKNOWN_CODE})


@dataclass(frozen=True)
class Facts:
    """What is known when every process of an attempt is dead."""

    rc: int | None
    code: int | None
    oom: bool = False
    we_asked: bool = False
    engine_broke: bool = False
    launcher_said: str = ""


def judge(facts: Facts) -> Ended:
    """Tell success, the user's failure and the machine's failure apart."""
    facts = _trust_rc_over_a_lost_code(_believe_the_kernel(facts))
    reason, detail = _find_cause(facts)
    return Ended(rc=facts.rc, code=facts.code, oom=facts.oom, reason=reason, detail=detail)


def judge_vanished(rc: int | None) -> Ended:
    """The container has gone without us: only a plain failure that was recorded before still counts."""
    if rc is not None and rc != 0 and rc not in SUSPICIOUS_CODES:
        return Ended(rc=rc, code=rc)
    detail = "the container was removed from outside before its end was seen"
    return Ended(rc=rc, code=None, reason=Reason.CONTAINER_VANISHED, detail=detail)


def _believe_the_kernel(facts: Facts) -> Facts:
    """The launcher repeats the kernel's count of processes killed for want of memory."""
    if re.search(r"^oom_kill [1-9]", facts.launcher_said, re.MULTILINE):
        return replace(facts, oom=True)
    return facts


def _trust_rc_over_a_lost_code(facts: Facts) -> Facts:
    if facts.code == UNKNOWN_CODE and facts.engine_broke and facts.rc is not None:
        return replace(facts, code=facts.rc)
    return facts


def _find_cause(facts: Facts) -> tuple[Reason | None, str]:
    if facts.rc == 0 and facts.code == 0:
        return None, ""
    if facts.we_asked:
        return None, ""  # whoever asked knows why
    if facts.oom:
        return Reason.OOM, "the memory limit was reached and the kernel killed a process"
    if facts.engine_broke and _ended_by_signal(facts):
        return Reason.DAEMON_ERROR, "the container engine restarted while the step ran"
    if facts.rc is None:
        return _find_cause_without_rc(facts)
    if facts.rc == 0 and facts.code in (KILLED_CODE, None):
        return Reason.KILLED, "the processes were killed although the script had recorded success"
    return None, ""


def _ended_by_signal(facts: Facts) -> bool:
    return facts.code in SUSPICIOUS_CODES or facts.rc in {KILLED_CODE, TERMINATED_CODE}


def _find_cause_without_rc(facts: Facts) -> tuple[Reason | None, str]:
    said = facts.launcher_said.strip()
    if facts.code in NO_EXEC_CODES and re.search(r"\[FATAL tini \(\d+\)\] exec \S+ failed", said):
        return Reason.NO_SHELL, _last_line(said)
    if "No space left on device" in said:
        return Reason.DISK_FULL, _last_line(said)
    if re.search(r"can(?:no|')t fork|fork: retry|Resource temporarily unavailable", said, re.IGNORECASE):
        return (
            Reason.BAD_CONFIG,
            f"the limit of processes is too small to start the script: {_last_line(said)}",
        )
    if facts.code == KILLED_CODE:
        return Reason.KILLED, "every process was killed before the script could end"
    if facts.code == 0 or facts.code is None:
        return Reason.KILLED, _last_line(said) or "the script ended without recording its exit code"
    return None, _last_line(said)


def _last_line(text: str) -> str:
    return text.strip().rsplit("\n", 1)[-1][:500]


class Remedy(Enum):
    """What a failed request of ours can still be helped by."""

    NOTHING = auto()
    NEW_HOLDER = auto()


_NO_SPACE = (r"no space left on device|disk quota exceeded", Reason.DISK_FULL)

_CREATE: Final = (
    (r"invalid reference format|repository name .*must be lowercase", Reason.BAD_CONFIG),
    (r"bind source path does not exist|unknown capability|invalid security|seccomp", Reason.INTERNAL),
    (r"no such image|image not found", Reason.IMAGE_NOT_FOUND),
    (r"minimum memory limit|range of cpus|shm size|pids? limit", Reason.BAD_CONFIG),
    (r"working directory .* is invalid|invalid environment variable", Reason.BAD_CONFIG),
    (
        r"duplicate mount point|invalid mount (target|config|path)|mount path must be absolute",
        Reason.BAD_CONFIG,
    ),
    _NO_SPACE,
)

_START: Final = (
    _NO_SPACE,
    (r"docker-init\"?: (stat|no such file)", Reason.BAD_CONFIG),
    (r"unable to find (user|group)|no matching entries in (passwd|group) file", Reason.BAD_CONFIG),
    (r"exec: \"?/bin/sh|exec /bin/sh|executable file not found", Reason.NO_SHELL),
    (r"exec format error", Reason.NO_SHELL),
    (r"trying to mount a directory onto a file|not a directory", Reason.BAD_CONFIG),
    (r"read-only file system", Reason.BAD_CONFIG),
    (r"cannot allocate memory|error setting rlimit", Reason.DAEMON_ERROR),
)

_PULL: Final = (
    _NO_SPACE,
    (r"toomanyrequests|too many requests|rate limit", Reason.PULL_NETWORK),
    (r"unauthorized|denied|forbidden|authentication required|no basic auth", Reason.IMAGE_DENIED),
    (r"certificate|x509|http response to https client", Reason.PULL_NETWORK),
    (r"no such host|server misbehaving|temporary failure in name", Reason.PULL_NETWORK),
    (r"invalid reference format|must be lowercase|invalid (tag|checksum digest)", Reason.BAD_CONFIG),
    (r"manifest unknown|manifest for .* not found|name unknown", Reason.IMAGE_NOT_FOUND),
    (r"no matching manifest|cannot be used on this platform", Reason.IMAGE_NOT_FOUND),
    (r"timeout|timed out|deadline exceeded|refused|reset|broken pipe|unreachable", Reason.PULL_NETWORK),
    (
        r"\beof\b|tls handshake|proxyconnect|request canceled|blob upload|unexpected (http )?status",
        Reason.PULL_NETWORK,
    ),
    (r"\b5\d\d\b", Reason.PULL_NETWORK),
    (r"repository .*not found|not found", Reason.IMAGE_NOT_FOUND),
)

_LASTING: Final = re.compile(r"certificate|x509|http response to https client", re.IGNORECASE)


def explain_create(text: str) -> Reason:
    return _look_up(_CREATE, text)


def explain_start(text: str) -> Reason:
    return _look_up(_START, text)


def explain_pull(text: str) -> Reason:
    return _look_up(_PULL, text)


def find_remedy(text: str) -> Remedy:
    """Whether a container could start after all with a fresh network holder."""
    lost = r"no such container|cannot join network of a non running container|network namespace.*no such"
    return Remedy.NEW_HOLDER if re.search(lost, text, re.IGNORECASE) else Remedy.NOTHING


def lacks_image(text: str) -> bool:
    """Whether the engine refuses to make a container for want of its image alone."""
    return explain_create(text) is Reason.IMAGE_NOT_FOUND


def engine_gave_up(text: str) -> bool:
    """An engine that ends breaks off what it does, in these words; no registry says them."""
    return re.search(r"context cancell?ed|daemon is shutting down", text, re.IGNORECASE) is not None


def may_pull_again(text: str) -> bool:
    """Only what passes by itself is worth a second try."""
    return explain_pull(text) is Reason.PULL_NETWORK and not _LASTING.search(text)


def _look_up(table: tuple[tuple[str, Reason], ...], text: str) -> Reason:
    for pattern, reason in table:
        if re.search(pattern, text, re.IGNORECASE):
            return reason
    return Reason.DAEMON_ERROR
