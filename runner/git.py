"""The only file that runs git: as argv, as an unprivileged user, within bounds, with no settings but ours."""

import os
import pwd
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from runner.credentials import Credentials
from runner.errors import BadSetup, StepError
from runner.orphans import end_processes_at
from shared.reasons import Reason

PASSED_ON = (
    "GIT_SSL_CAINFO",
    "GIT_SSL_CAPATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "CURL_CA_BUNDLE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
)
SETTINGS = (
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.protectHFS=true",
    "core.protectNTFS=true",
    "core.askPass=",
    "credential.helper=",
    "gc.auto=0",
    "maintenance.auto=false",
    "http.followRedirects=false",
    "http.lowSpeedLimit=1000",
    "protocol.ext.allow=never",
    "submodule.recurse=false",
    "fetch.recurseSubmodules=false",
    "advice.detachedHead=false",
    "init.defaultBranch=main",
)
ASKPASS = """#!/bin/sh
# Answers for one host only, whatever git asks.
case "$1" in
"Username for '$BUILDMILL_GIT_HOST': ") printf '%s\\n' "$BUILDMILL_GIT_USERNAME" ;;
"Password for '"*"$BUILDMILL_GIT_PROMPT': ") printf '%s\\n' "$BUILDMILL_GIT_TOKEN" ;;
*) exit 1 ;;
esac
"""
LENT = "access-"
MAX_OUTPUT_BYTES = 64 * 1024 * 1024
MAX_ERROR_BYTES = 16 * 1024
WATCH_EVERY_S = 0.25
PROGRESS_EVERY_S = 5.0
SETTLE_S = 5.0
UNPRIVILEGED_USERS = ("buildmill", "nobody")

DENIED = (
    "Authentication failed",
    "could not read Username",
    "could not read Password",
    "Permission denied",
    "Host key verification failed",
    "terminal prompts disabled",
    "returned error: 401",
    "returned error: 403",
    "returned error: 404",
    "returned error: 30",
    "not allowed",
    "not found",
    "does not appear to be a git repository",
    "not a git repository",
    "dubious ownership",
    "unable to update url base from redirection",
    "invalid path",
)


@dataclass(frozen=True)
class RunAs:
    """The user that git runs as, and that owns what git writes."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class Budget:
    """What one piece of git's work may take."""

    seconds: float = 600.0
    bytes: int = 8 * 1024**3
    slow_seconds: int = 60  # below a kilobyte per second for so long, and a server is given up


@dataclass(frozen=True)
class Remote:
    """A repository's address, checked, and the login for it."""

    url: str
    scheme: str
    host: str = ""


class GitFailed(Exception):
    """git ended with an error; `text` is what it said last."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


def unprivileged_user() -> RunAs | None:
    """Whom git runs as: somebody without rights where we are root, else ourselves."""
    if os.geteuid() != 0:
        return None
    for name in UNPRIVILEGED_USERS:
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            continue
        return RunAs(name, found.pw_uid, found.pw_gid)
    raise BadSetup("git needs an unprivileged user: run `useradd --system buildmill`")


def check_url(url: str, protocols: frozenset[str]) -> Remote:
    """Read a repository's address, or refuse it before git sees it."""
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in protocols:
        allowed = ", ".join(sorted(protocols))
        raise StepError(
            Reason.BAD_CONFIG, f"the repository address must begin with one of: {allowed} (and ://)"
        )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise StepError(Reason.BAD_CONFIG, "the repository address cannot be read") from error
    wrong = _what_is_wrong(
        url, scheme, parts.netloc, parts.username, parts.password, parts.hostname, parts.path
    )
    if wrong:
        raise StepError(Reason.BAD_CONFIG, f"the repository address {wrong}")
    host = (parts.hostname or "").lower()
    return Remote(url, scheme, f"{host}:{port}" if port is not None else host)


def _what_is_wrong(
    url: str,
    scheme: str,
    netloc: str,
    username: str | None,
    password: str | None,
    hostname: str | None,
    path: str,
) -> str:
    decoded = unquote(url)
    if any(ord(sign) <= 32 or ord(sign) == 127 for sign in decoded) or not url.isascii() or len(url) > 2_048:
        return "has blanks, control characters or letters outside ASCII, or is too long"
    if "?" in url or "#" in url or "\\" in url:
        return "must have neither a query nor a fragment nor a backslash"
    if scheme == "file":
        is_plain = not netloc and path.startswith("/") and ".." not in unquote(path).split("/")
        return "" if is_plain else "must be file:/// and an absolute path"
    if not hostname or hostname.startswith("-") or not re.fullmatch(r"[A-Za-z0-9._:-]+", hostname):
        return "has no usable host"
    if "%" in netloc or netloc.count("@") > 1:
        return "has no usable host"
    if netloc.endswith((":", ":0")) or (scheme != "ssh" and netloc.endswith(":22")):
        return "has an unusable port"
    if password is not None or (username is not None and scheme != "ssh"):
        return "must not hold a user name or a password; logins belong into the runner's credentials file"
    if username is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", username):
        return "has an unusable user name"
    if not path.strip("/") or any(part.startswith("-") for part in unquote(path).split("/")):
        return "has no usable path"
    return ""


@dataclass(frozen=True)
class Git:
    """Starts git with an environment made from scratch."""

    home: Path
    run_as: RunAs | None = None
    credentials: Credentials = field(default_factory=Credentials)
    environ: Mapping[str, str] = field(default_factory=dict)
    slow_seconds: int = Budget.slow_seconds

    def run(
        self,
        arguments: Sequence[str],
        *,
        folder: Path,
        deadline: float,
        extra: Mapping[str, str] | None = None,
        watch: Callable[[], None] | None = None,
        progress: Callable[[str], None] | None = None,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> str:
        """Run one command to its end and return what it printed; raise GitFailed where it failed.

        It is ended at once when it is no longer wanted.
        """
        if not is_wanted():
            raise _unwanted()
        settings = (*SETTINGS, f"http.lowSpeedTime={self.slow_seconds}")
        command = ["git", *(part for setting in settings for part in ("-c", setting)), *arguments]
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**self._environment(), **(extra or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            umask=0,  # what is checked out has to be writable for every user of a container
            user=None if self.run_as is None else self.run_as.uid,
            group=None if self.run_as is None else self.run_as.gid,
            extra_groups=None if self.run_as is None else [],
        )
        try:
            output, errors = _Conversation(
                process, deadline, watch, self._masked(progress), is_wanted
            ).listen()
        finally:
            _end_group(process)
        if process.returncode != 0:
            raise GitFailed(process.returncode, self.mask(errors))
        return output

    @contextmanager
    def access(self, remote: Remote) -> Iterator[dict[str, str]]:
        """The environment that lets git speak to this one repository, and nothing more."""
        folder = Path(tempfile.mkdtemp(prefix=LENT, dir=self.home))
        try:
            yield {"GIT_ALLOW_PROTOCOL": remote.scheme, **self._login(remote, folder)}
        finally:
            shutil.rmtree(folder)

    def end_former(self) -> None:
        """End what still runs of a former life; nothing that git does in this one may be under way."""
        end_processes_at(self.home)

    def take_back_logins(self) -> None:
        """Remove what a former life lent to git and was killed before it took it back."""
        for folder in self.home.glob(f"{LENT}*"):
            shutil.rmtree(folder)

    def mask(self, text: str) -> str:
        """Take the logins out of a text that somebody will read."""
        for secret in self.credentials.secrets():
            text = text.replace(secret, "***")
        return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)

    def own(self, path: Path) -> None:
        """Give a file or folder to the user that git runs as."""
        if self.run_as is not None:
            os.chown(path, self.run_as.uid, self.run_as.gid)

    def let_in(self, folder: Path) -> None:
        """Let the user that git runs as pass through a folder of ours, and no other user."""
        if self.run_as is not None:
            os.chown(folder, os.geteuid(), self.run_as.gid)
        folder.chmod(0o700 if self.run_as is None else 0o710)

    def _environment(self) -> dict[str, str]:
        passed = {
            name: value
            for name, value in self.environ.items()
            if name in PASSED_ON or (name.upper() in PASSED_ON and name.islower())
        }
        if "SSL_CERT_FILE" in passed:
            passed.setdefault("GIT_SSL_CAINFO", passed["SSL_CERT_FILE"])
        return {
            **passed,
            "PATH": self.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"),
            "HOME": str(self.home),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_ATTR_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_ASKPASS": "/bin/false",
            "SSH_ASKPASS": "/bin/false",
            "GIT_LFS_SKIP_SMUDGE": "1",
            "GIT_NO_REPLACE_OBJECTS": "1",
            "GIT_OPTIONAL_LOCKS": "0",
            "GIT_ALLOW_PROTOCOL": "none",
            "GIT_PROTOCOL_FROM_USER": "0",
        }

    def _login(self, remote: Remote, folder: Path) -> dict[str, str]:
        self.own(folder)
        if remote.scheme == "file":
            return {"GIT_CONFIG_GLOBAL": str(self._trust_folder(remote, folder))}
        login = self.credentials.git.get(remote.host)
        if remote.scheme == "ssh":
            ssh = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=30"]
            if login is not None and login.ssh_key is not None:
                key = self._private_copy(login.ssh_key, folder / "key")
                ssh += ["-o", "IdentitiesOnly=yes", "-i", str(key)]
            if login is not None and login.known_hosts is not None:
                hosts = self._private_copy(login.known_hosts, folder / "known_hosts")
                ssh += ["-o", f"UserKnownHostsFile={hosts}"]
            return {"GIT_SSH_COMMAND": shlex.join(ssh), "GIT_SSH_VARIANT": "ssh"}
        if login is None or not login.token or not _is_private_line(remote):
            return {}
        askpass = folder / "askpass"
        askpass.write_text(ASKPASS)
        askpass.chmod(0o500)
        self.own(askpass)
        return {
            "GIT_ASKPASS": str(askpass),
            "BUILDMILL_GIT_HOST": f"{remote.scheme}://{remote.host}",
            "BUILDMILL_GIT_PROMPT": f"@{remote.host}",
            "BUILDMILL_GIT_USERNAME": login.username,
            "BUILDMILL_GIT_TOKEN": login.token,
        }

    def _trust_folder(self, remote: Remote, folder: Path) -> Path:
        """A repository on this machine may belong to another user; git is told that this one is meant."""
        place = Path(unquote(urlsplit(remote.url).path))
        named = {str(path) for base in (place, place.resolve()) for path in (base, base / ".git")}
        settings = folder / "config"
        quoted = [path.replace("\\", "\\\\").replace('"', '\\"') for path in sorted(named)]
        settings.write_text("[safe]\n" + "".join(f'\tdirectory = "{path}"\n' for path in quoted))
        self.own(settings)
        return settings

    def _private_copy(self, source: Path, target: Path) -> Path:
        """ssh wants files that belong to its user and that nobody else can read."""
        try:
            content = source.read_bytes()
        except OSError as error:
            raise StepError(Reason.BAD_CONFIG, f"{source} cannot be read: {error.strerror}") from error
        target.touch(mode=0o600)
        target.write_bytes(content)
        self.own(target)
        return target

    def _masked(self, progress: Callable[[str], None] | None) -> Callable[[str], None] | None:
        return None if progress is None else lambda line: progress(self.mask(line))


class _Conversation:
    """Listens to one git process until it ends, runs out of time, takes too much room or is not wanted."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        deadline: float,
        watch: Callable[[], None] | None,
        progress: Callable[[str], None] | None,
        is_wanted: Callable[[], bool],
    ) -> None:
        self.process = process
        self.deadline = deadline
        self.watch = watch
        self.progress = progress
        self.is_wanted = is_wanted
        self.output = bytearray()
        self.errors = bytearray()
        self.next_watch = time.monotonic() + WATCH_EVERY_S
        self.next_progress = time.monotonic() + PROGRESS_EVERY_S

    def listen(self) -> tuple[str, str]:
        assert self.process.stdout is not None and self.process.stderr is not None  # noqa: S101 (we asked for pipes)
        with selectors.DefaultSelector() as selector, self.process.stdout, self.process.stderr:
            selector.register(self.process.stdout, selectors.EVENT_READ, self._hear_output)
            selector.register(self.process.stderr, selectors.EVENT_READ, self._hear_errors)
            while selector.get_map():
                for key, _ in selector.select(WATCH_EVERY_S):
                    chunk = os.read(key.fd, 65_536)
                    if chunk:
                        key.data(chunk)
                    else:
                        selector.unregister(key.fileobj)
                self._check_bounds()
            self._await_end()
        return self.output.decode(errors="replace"), self.errors.decode(errors="replace")

    def _await_end(self) -> None:
        """Wait without reaping: until `_end_group` has come, the process has to keep its number."""
        end = os.pidfd_open(self.process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(end, selectors.EVENT_READ)
                while not selector.select(WATCH_EVERY_S):
                    self._check_bounds()
        finally:
            os.close(end)

    def _hear_output(self, chunk: bytes) -> None:
        self.output += chunk
        if len(self.output) > MAX_OUTPUT_BYTES:
            raise StepError(Reason.DISK_LIMIT, "the repository holds more files than this runner accepts")

    def _hear_errors(self, chunk: bytes) -> None:
        self.errors += chunk
        del self.errors[:-MAX_ERROR_BYTES]
        if self.progress is not None and time.monotonic() >= self.next_progress:
            self.next_progress = time.monotonic() + PROGRESS_EVERY_S
            lines = [line.strip() for line in re.split(rb"[\r\n]+", bytes(self.errors)) if line.strip()]
            if lines:
                self.progress(lines[-1].decode(errors="replace"))

    def _check_bounds(self) -> None:
        now = time.monotonic()
        if not self.is_wanted():
            raise _unwanted()
        if now >= self.deadline:
            raise _out_of_time()
        if self.watch is not None and now >= self.next_watch:
            self.watch()
            took = time.monotonic() - now
            self.next_watch = now + max(WATCH_EVERY_S, 10 * took)  # a look at many files must not be the load


def _is_private_line(remote: Remote) -> bool:
    """A token may travel encrypted, or without leaving this machine."""
    return remote.scheme == "https" or remote.host.split(":")[0] in ("127.0.0.1", "localhost")


def _out_of_time() -> StepError:
    return StepError(
        Reason.INTERNAL, "git took longer than its time limit; the repository's server may be slow"
    )


def _unwanted() -> StepError:
    return StepError(Reason.CANCELLED, "nobody waits for git any more")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Leave no helper of git behind, whether git ended well or not."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the whole group has ended already
    process.wait(SETTLE_S)


def explain_failure(failure: GitFailed, action: str) -> StepError:
    """Say in the step's terms why git could not do `action`."""
    lines = [line for line in re.split(r"[\r\n]+", failure.text) if line.strip()]
    detail = f"{action}: " + ("\n".join(lines[-6:]) or f"git ended with {failure.code}")
    if "No space left" in failure.text or "Disk quota" in failure.text:
        return StepError(Reason.DISK_FULL, detail)
    if any(phrase in failure.text for phrase in DENIED):
        return StepError(Reason.BAD_CONFIG, detail)
    return StepError(Reason.INTERNAL, detail)
