"""The bash script of a step: the only file that turns text of a user into text for a shell.

The script runs in bash, dash and busybox sh, from a file or from a pipe.
All of it stands in functions which the last line calls, so half a download executes nothing.
What the user wrote is quoted data until `eval` reads it, in a subshell of its own with nothing on stdin:
whatever it does to its shell, the exit status is taken outside.
"""

import hashlib
import re
from collections.abc import Mapping

from shared.references import InvalidReference, env_value, environment

_FIRST_LINE_LIMIT = 200
_OURS = re.compile(r"CI|BUILDMILL_[A-Z0-9_]+")
_READ_BY_THE_SCRIPT = frozenset({"BUILDMILL_NONCE", "BUILDMILL_WORKSPACE"})

# An imported function may stand in for any builtin, `unset` included: only in posix mode do the special ones
# come first, and only an assignment switches that on without calling anything.
_PREPARE = r"""#!/usr/bin/env bash
buildmill_clean_shell() {
  case ${BASH_VERSION-} in ?*)
    buildmill_posix=${POSIXLY_CORRECT-unset}
    POSIXLY_CORRECT=1
    unset -f unset builtin
    case $buildmill_posix in unset) unset POSIXLY_CORRECT ;; esac
    for buildmill_word in $(builtin declare -F); do
      case $buildmill_word in
        declare|-f*|buildmill_*) ;;
        *) builtin unset -f "$buildmill_word" ;;
      esac
    done
    builtin unset -f declare
    export -n SHELLOPTS BASHOPTS 2>/dev/null
    unset buildmill_posix buildmill_word ;;
  *) unset SHELLOPTS BASHOPTS ;;
  esac
  set +Caefuvx
  unset BASH_ENV ENV PROMPT_COMMAND PS4 CDPATH
  PS4='+ '
}
buildmill_milliseconds() {
  buildmill_clock=${EPOCHREALTIME-}
  case $buildmill_clock in
    *[!0-9.,]*|'') buildmill_clock=$(date +%s 2>/dev/null).000000 ;;
  esac
  buildmill_fraction=${buildmill_clock#*[.,]}
  printf '%s%s' "${buildmill_clock%[.,]*}" "${buildmill_fraction%???}"
}
buildmill_mark() {
  case $buildmill_nonce in ?*)
    printf '##[buildmill:%s %s %s %s]\n' "$1" "$buildmill_nonce" "$buildmill_name" "$(buildmill_milliseconds)"
  esac
}
buildmill_syntax_is_good() {
  case ${BASH_VERSION-} in '') return 0 ;; esac
  buildmill_errors=$(printf '%s\n' "$buildmill_text" | "$BASH" -n 2>&1)
  case $? in 1|2) ;; *) return 0 ;; esac
  printf '%s\n' "$buildmill_text" | "$BASH" -O extglob -n 2>/dev/null && return 0
  printf '%s\nsyntax error\n' "$buildmill_errors" >&2
  return 1
}
buildmill_find_home() {
  case ${HOME-} in
    ''|/) ;;
    *)
      [ -e "$HOME" ] || mkdir -p -- "$HOME" 2>/dev/null
      [ -d "$HOME" ] && [ -w "$HOME" ] && return 0 ;;
  esac
  HOME=/tmp/home
  mkdir -p -m 0700 /tmp/home 2>/dev/null
  if [ -L /tmp/home ] || ! [ -O /tmp/home ] || ! [ -w /tmp/home ]; then
    HOME=$(mktemp -d "${TMPDIR:-/tmp}/home.XXXXXX") || printf 'no writable directory for HOME\n' >&2
  fi
  export HOME
}
buildmill_enter_workspace() {
  case ${BUILDMILL_WORKSPACE-} in
    ?*) cd -- "$BUILDMILL_WORKSPACE" ;;
  esac
}
"""

# The user's TERM trap, or ours, decides how the subshell ends; the outer shell waits for it.
_BEGIN = r"""  unset buildmill_text buildmill_name buildmill_nonce
  buildmill_nonce=${BUILDMILL_NONCE-}
  unset BUILDMILL_NONCE
  trap : TERM INT HUP
"""

# Without a trap for TERM some releases of bash print the subshell that ended, and dash skips EXIT traps.
# At top level, so that `local`, `return`, ERR and EXIT traps mean what they mean in a file.
_LAST_LINE = (
    "{ buildmill_clean_shell; buildmill_begin; buildmill_syntax_is_good || exit 2; buildmill_mark start; "
    "( trap 'exit 143' TERM; buildmill_prepare || exit 1; set -e; eval \"$buildmill_text\" ) </dev/null; "
    'buildmill_end "$?"; exit "$buildmill_status"; }\n'
)


def render_step_script(
    *, name: str, run_script: str, env: Mapping[str, str], variables: Mapping[str, str]
) -> str:
    """Write the script of a step; its exit status is that of `run_script`.

    `env` is the user's, `variables` are ours and come after it, so that nothing overrides them.
    """
    _refuse_what_no_shell_can_carry(run_script, "the script of the step")
    _refuse_what_no_shell_can_carry(name, "the name of the step")
    if any(character < " " or character == "\x7f" for character in name):
        raise InvalidReference("the name of the step holds a control character")
    begin = [
        "buildmill_begin() {\n",
        _BEGIN,
        f"  buildmill_name={quote(name)}\n",
        f"  buildmill_text={quote(run_script)}\n",
        "}\n",
    ]
    exports = [f"  export {key}={quote(value)}\n" for key, value in environment(env).items()]
    ours = [f"  export {_our_name(key)}={quote(env_value(value))}\n" for key, value in variables.items()]
    prepare = [
        "buildmill_prepare() {\n",
        *exports,
        *ours,
        "  buildmill_find_home\n",
        "  buildmill_enter_workspace || return 1\n",
        f"  printf '%s\\n' {quote('+ ' + _first_line(run_script))}\n",
        "  if (set -o pipefail) 2>/dev/null; then set -o pipefail; fi\n",
        "}\n",
    ]
    end = "buildmill_end() {\n  buildmill_status=$1\n  buildmill_mark end\n}\n"
    return "".join([_PREPARE, *begin, *prepare, end, _LAST_LINE])


def quote(text: str) -> str:
    """Quote text so that any POSIX shell reads exactly its bytes."""
    return "'" + text.replace("'", "'\\''") + "'"


def script_digest(text: str) -> str:
    """Name a script by the SHA-256 of its bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _refuse_what_no_shell_can_carry(text: str, what: str) -> None:
    if "\0" in text:
        raise InvalidReference(f"{what} holds a NUL byte")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidReference(f"{what} is not valid UTF-8") from error


def _our_name(name: str) -> str:
    if not _OURS.fullmatch(name) or name in _READ_BY_THE_SCRIPT:
        raise InvalidReference(f"{name!r} is no variable that a step is given")
    return name


def _first_line(run_script: str) -> str:
    for line in run_script.split("\n", 20):
        shown = line[: _FIRST_LINE_LIMIT + 1].strip("\r\ufeff \t")
        if shown:
            return shown if len(shown) <= _FIRST_LINE_LIMIT else shown[:_FIRST_LINE_LIMIT] + "..."
    return ""
