"""The few files of an attempt through which a step's output and its exit code leave it.

What runs in the step may write into `log`, `rc` and `pipe`, so nothing in here trusts their contents, and
each is opened without following links and only if it is still the very file that we made.
"""

import json
import os
import re
import shlex
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.errors import StepError
from shared.reasons import Reason

INSIDE: Final = "/buildmill"
RC_LIMIT: Final = 16
DRAIN_S: Final = 2
RECORD: Final = "files.json"
_RC: Final = re.compile(rb"([0-9]{1,3})( lost)?\n")

# What is in the secrets' file is ours alone; it is emptied before the script can look.
# A line in rc says that the script has begun: an operator may start the container again, and the script is
# not run again for that. How the first run ended counts; one that wrote nothing was killed.
# Output goes through a pipe: a program that opens /dev/stderr anew would empty a regular file. The pump
# ignores TERM, so that the last words of a cancelled script arrive; two seconds bound the wait for daemons
# that keep the pipe open, and their end is told by a signal that nobody else sends. Where the pump ends in
# another way, the disk is full or somebody killed it, and the record says that output was lost. An image
# without cat or sleep gets the plain file.
_LAUNCH: Final = """\
trap : TERM INT HUP
if [ -s @/rc ]; then
    echo 'started a second time from outside' >&2
    read -r rc lost <@/rc
    exit "${rc:-137}"
fi
echo 2>/dev/null >@/rc
exec </dev/null
if [ -x /bin/bash ]; then s=/bin/bash; else s=/bin/sh; fi
if [ -e @/secrets ]; then
    { [ -f @/secrets ] && [ -s @/secrets ] && . @/secrets; } || { echo 'secrets unreadable' >&2; exit 125; }
    true 2>/dev/null >@/secrets
fi
has() { PATH=$PATH:/usr/bin:/bin command -v "$1" >/dev/null 2>&1; }
if has cat && has sleep; then
    ( trap '' TERM INT HUP; PATH=$PATH:/usr/bin:/bin; exec cat <@/pipe >>@/log ) & p=$!
    "$s" @/script.sh >@/pipe 2>&1
    rc=$?
    ( PATH=$PATH:/usr/bin:/bin; sleep @drain; kill -USR1 $p; sleep 1; kill -9 $p ) >/dev/null 2>&1 &
    wait $p; w=$?
    while kill -0 $p 2>/dev/null; do wait $p; w=$?; done
    if [ $w = 0 ] || [ $w = 138 ]; then lost=; else lost=' lost'; fi
else
    "$s" @/script.sh >>@/log 2>&1
    rc=$?
    lost=
fi
@tell_oom
printf '%s\\n' "$rc$lost" >@/rc
exit "$rc"
"""


# Not every engine notices when the kernel kills a process for want of memory; the kernel's own count, of
# either kind of control groups, goes into the launcher's own output.
_TELL_OOM: Final = """\
if [ "$rc" != 0 ]; then
    for f in /sys/fs/cgroup/memory.events /sys/fs/cgroup/memory/memory.oom_control; do
        [ -r "$f" ] && while read -r name count; do
            [ "$name" = oom_kill ] && echo "oom_kill $count" >&2
        done <"$f"
    done
fi
"""


def launch_text(folder: str = INSIDE) -> str:
    """The shell program that runs `script.sh` of `folder` and records how it ended."""
    tell_oom = _TELL_OOM if folder == INSIDE else ""  # outside a container the count is the whole machine's
    text = _LAUNCH.replace("@tell_oom\n", tell_oom).replace("@drain", str(DRAIN_S))
    return text.replace("@/", shlex.quote(folder) + "/")


@dataclass(frozen=True)
class AttemptFiles:
    """Where the files of one attempt stand on this machine."""

    folder: Path

    @property
    def launch(self) -> Path:
        return self.folder / "launch.sh"

    @property
    def script(self) -> Path:
        return self.folder / "script.sh"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def rc(self) -> Path:
        return self.folder / "rc"

    @property
    def pipe(self) -> Path:
        return self.folder / "pipe"


def make_attempt_files(attempt_dir: Path, *, inside: str = INSIDE) -> AttemptFiles:
    """Make launcher, log, rc and pipe; what an earlier call finished making is kept.

    `inside` is the folder where the step sees them.
    """
    files = AttemptFiles(attempt_dir)
    if (attempt_dir / RECORD).exists():
        return files
    for path in (files.launch, files.log, files.rc, files.pipe):
        path.unlink(missing_ok=True)  # half made by a process that died; nothing has run yet
    _write_new(files.launch, launch_text(inside).encode(), mode=0o444)
    os.mkfifo(files.pipe)
    files.pipe.chmod(0o666)  # the step may be any user
    made = {name: _make_empty(attempt_dir / name) for name in ("log", "rc")}
    part = attempt_dir / f"{RECORD}.part"
    part.write_text(json.dumps(made), encoding="utf-8")
    part.rename(attempt_dir / RECORD)  # from here on the files count as made
    return files


def open_log(attempt_dir: Path) -> int:
    """Open the log for reading; the caller closes the descriptor."""
    descriptor = _open_made(attempt_dir, "log")
    if descriptor is None:
        raise StepError(Reason.INTERNAL, "the step's log has been removed or replaced")
    return descriptor


def read_rc(attempt_dir: Path) -> int | None:
    """What the launcher recorded; None while it is not whole, or when it is no file of ours."""
    found = _read_record(attempt_dir)
    return int(found.group(1)) if found else None


def has_lost_output(attempt_dir: Path) -> bool:
    """True when the launcher recorded that some of the output could not be written to the log."""
    found = _read_record(attempt_dir)
    return found is not None and found.group(2) is not None


def _read_record(attempt_dir: Path) -> re.Match[bytes] | None:
    descriptor = _open_made(attempt_dir, "rc")
    if descriptor is None:
        return None
    try:
        return _RC.fullmatch(os.read(descriptor, RC_LIMIT))
    finally:
        os.close(descriptor)


def _make_empty(path: Path) -> list[int]:
    made = _write_new(path, b"", mode=0o666)  # the step may be any user
    return [made.st_dev, made.st_ino]


def _write_new(path: Path, content: bytes, *, mode: int) -> os.stat_result:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.fchmod(descriptor, mode)  # whatever the umask says
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _open_made(attempt_dir: Path, name: str) -> int | None:
    try:
        made = json.loads((attempt_dir / RECORD).read_text(encoding="utf-8"))[name]
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(attempt_dir / name, flags)
    except OSError:  # not made yet, gone, or a link now
        return None
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and [found.st_dev, found.st_ino] == made:
        return descriptor
    os.close(descriptor)
    return None
