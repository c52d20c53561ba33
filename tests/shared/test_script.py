"""The script of a step, run by every shell that a container may hold."""

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.script import quote, render_step_script, script_digest

SHELLS = {
    name: argv
    for name, argv in {"bash": ["bash"], "dash": ["dash"], "busybox": ["busybox", "sh"]}.items()
    if name == "bash" or shutil.which(argv[0])
}
WAYS = [f"{shell} {way}" for shell in SHELLS for way in ("file", "pipe")]


@dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


Run = Callable[..., Ended]


def a_script(run_script: str, **changes: Mapping[str, str] | str) -> str:
    given = {"name": "compile", "env": {}, "variables": {"CI": "true"}, **changes}
    return render_step_script(run_script=run_script, **given)  # type: ignore[arg-type]


def start(text: str, way: str, place: Path, env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    shell, _, how = way.partition(" ")
    argv = SHELLS[shell]
    file = place / "script.sh"
    file.write_bytes(text.encode())
    fed = place / "stdin"
    fed.write_bytes(b"echo fed from outside\n" if how == "file" else text.encode() + b"echo behind the end\n")
    with fed.open("rb") as stdin:
        return subprocess.Popen(
            [*argv, str(file)] if how == "file" else [*argv, "-s"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=place,
            env=dict(env),
            start_new_session=True,
        )


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(way: str, tmp_path: Path) -> Run:
    def run(text: str, **env: str) -> Ended:
        around = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **env}
        with start(text, way, tmp_path, around) as process:
            out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))

    return run


def lines_of_user(ended: Ended) -> list[str]:
    return [line for line in ended.out.splitlines() if not line.startswith("+ ")]


# What a script may do to its shell


@pytest.mark.parametrize(
    ("run_script", "status", "lines"),
    [
        ("true", 0, []),
        ("exit 7", 7, []),
        ("echo a\nfalse\necho b", 1, ["a"]),
        ("cat; read -r x || echo nothing; echo after", 0, ["nothing", "after"]),
        ("exec sh -c 'echo replaced; exit 9'", 9, ["replaced"]),
        ("trap 'echo bye' EXIT; exit 4", 4, ["bye"]),
        ("trap - EXIT; false", 1, []),
        ("set +e; false; echo on", 0, ["on"]),
        ("( exit 3 )", 3, []),
        ("x='\n'; echo \"[$x]\"", 0, ["[", "]"]),
        ("cat <<EOF\nbuildmill_end\nEOF\necho done", 0, ["buildmill_end", "done"]),
        ("cat <<EOF\nunterminated", 0, ["unterminated"]),
        ("echo no newline \\", 0, ["no newline \\"]),
        ("echo '}'; }\necho broken out", 2, None),
        ("echo 'open", 2, None),
        ("if true; then\r\n  echo x\r\nfi\r\n", 2, None),
        ("echo %s%n \\\\ '${{ secrets.X }}' '{{7*7}}'", 0, ["%s%n \\ ${{ secrets.X }} {{7*7}}"]),
        ("kill -9 $(sh -c 'echo $PPID')", 137, None),
        ("echo '##[complete]'; echo '::set-env name=A::b'", 0, ["##[complete]", "::set-env name=A::b"]),
        ("set -u; echo ok", 0, ["ok"]),
        ("echo $#", 0, ["0"]),
        ("echo ${A-unset}", 0, ["unset"]),
        ("nosuchprogram", 127, []),
        ("", 0, []),
    ],
)
def test_the_status_is_that_of_the_users_script(
    run: Run, run_script: str, status: int, lines: list[str] | None
) -> None:
    ended = run(a_script(run_script))

    assert ended.status == status
    assert lines is None or lines_of_user(ended) == lines


@pytest.mark.threat("B06")
def test_traps_and_functions_of_the_script_speak_for_the_script_alone(run: Run) -> None:
    # `trap 'exit 0' EXIT` is the user's own word about the user's own script.
    assert run(a_script("trap 'exit 0' EXIT; exit 5")).status == 0
    assert run(a_script("exit() { :; }; return() { :; }; set() { :; }; false")).status != 0


def test_the_first_failure_in_a_pipe_counts_where_the_shell_can_tell(run: Run, way: str) -> None:
    ended = run(a_script("(exit 6) | cat"))

    assert ended.status == (0 if way.startswith("dash") else 6)


def test_nothing_runs_before_a_syntax_error_in_bash(run: Run, way: str, tmp_path: Path) -> None:
    ended = run(a_script("touch early\nif then"))

    assert ended.status == 2
    if way.startswith("bash"):
        assert not (tmp_path / "early").exists()
        assert ended.err.splitlines()[-1] == "syntax error"
        assert "line 2" in ended.err


@pytest.mark.parametrize("way", ["bash file", "bash pipe"], indirect=True)
def test_bash_may_learn_new_syntax_on_its_way(run: Run) -> None:
    ended = run(a_script("shopt -s extglob\ncase abc in !(x|y)) echo found ;; esac"))

    assert (ended.status, lines_of_user(ended)) == (0, ["found"])


@pytest.mark.parametrize("way", ["bash file"], indirect=True)
def test_users_code_runs_at_the_top_level_as_in_a_file(run: Run) -> None:
    ended = run(a_script("declare -A m=([k]=v); trap 'echo \"end ${m[k]} ${#FUNCNAME[@]}\"' EXIT; false"))

    assert (ended.status, lines_of_user(ended)) == (1, ["end v 0"])


def test_the_first_line_is_shown_as_text(run: Run) -> None:
    ended = run(a_script("\n\n  echo -e '\\x41' %d \"$(echo x)\"\nexit 3"))

    assert ended.out.splitlines()[0] == "+ echo -e '\\x41' %d \"$(echo x)\""


def test_a_very_long_line_runs_and_is_not_shown_whole(run: Run) -> None:
    ended = run(a_script(": '" + "a" * 5_000_000 + "'\necho done"))

    assert (ended.status, lines_of_user(ended)) == (0, ["done"])
    assert len(ended.out) < 300


def test_two_hundred_thousand_lines_run(run: Run) -> None:
    ended = run(a_script(": x\n" * 200_000 + "echo done"))

    assert (ended.status, lines_of_user(ended)) == (0, ["done"])


# Bytes


@pytest.mark.threat("B06")
@pytest.mark.parametrize(
    "tail",
    [
        ": 'a\r\nb'\r",
        "# trailing \\",
        "# no final newline",
        "# final newlines\n\n\n",
        "# EOF\n# __END__\n# }\n# buildmill_begin() {",
        """# '"'"' "'"'"'" \\' '""",
        "# " + "x" * 1_000_000,
        "# \u00e9 \u0301 \u2028 \u0085 \U0001f600 \u202e \x01\x02\x7f\x80\x81\x88",
        ": '" + "".join(map(chr, [*range(1, 39), *range(40, 0x300)])) + "'",
    ],
)
def test_eval_gets_exactly_the_bytes_of_the_script(run: Run, tmp_path: Path, tail: str) -> None:
    run_script = 'printf %s "$buildmill_text" >seen\n' + tail

    ended = run(a_script(run_script))

    assert ended.status == 0
    assert (tmp_path / "seen").read_bytes() == run_script.encode()


@pytest.mark.threat("B06")
def test_a_byte_order_mark_reaches_the_shell(run: Run, tmp_path: Path) -> None:
    run_script = '\ufeff: || printf %s "$buildmill_text" >seen'

    run(a_script(run_script))

    assert (tmp_path / "seen").read_bytes() == run_script.encode()


@pytest.mark.parametrize("shell", SHELLS)
@given(text=st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])))
@settings(max_examples=25, deadline=None)
def test_quoted_text_is_read_byte_for_byte(shell: str, text: str) -> None:
    argv = [*SHELLS[shell], "-c", f"printf %s {quote(text)}"]

    seen = subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=10).stdout

    assert seen == text.encode()


@pytest.mark.threat("B05")
@pytest.mark.parametrize("bad", ["a\0b", "a\ud800b"])
def test_text_that_no_shell_can_carry_is_refused(bad: str) -> None:
    for case in (
        lambda: a_script(bad),
        lambda: a_script("true", name=bad),
        lambda: a_script("true", env={"A": bad}),
        lambda: a_script("true", variables={"BUILDMILL_STEP": bad}),
    ):
        with pytest.raises(ValueError, match=r"NUL|UTF-8"):
            case()


def test_the_text_around_the_users_is_plain_lines_and_depends_on_nothing_else() -> None:
    once, again = a_script("echo a"), a_script("echo a")

    assert once == again
    assert once.isascii()
    assert "\r" not in once
    assert once.endswith("}\n")
    assert script_digest(once) == hashlib.sha256(once.encode()).hexdigest()


# Variables

CANARIES = [
    "$(touch PWN)", "`touch PWN`", "a;touch PWN", "a&&touch PWN", "a|touch PWN", ">PWN", "!!", "~root", "*",
    "{a,b}", 'zzz";echo${IFS}"hello";#', "x$({touch,PWN})", "'; touch PWN; '", "a\nb\r\nc\n", "\u0085\u2028",
    "${{ secrets.X }}", "{{7*7}}", "%s%n", "${jndi:x}", "\\", "", " ", "-n",
]  # fmt: skip


@pytest.mark.threat("B01")
@pytest.mark.threat("B02")
@pytest.mark.threat("B04")
@pytest.mark.threat("B09")
def test_values_arrive_byte_for_byte_and_are_never_run(run: Run, tmp_path: Path) -> None:
    env = {f"V{i}": value for i, value in enumerate(CANARIES)}
    variables = {f"BUILDMILL_V{i}": value for i, value in enumerate(CANARIES)}

    run(a_script("env -0 >seen", env=env, variables=variables, name="$(touch PWN)"), BUILDMILL_NONCE="n")

    found = dict(item.split("=", 1) for item in (tmp_path / "seen").read_bytes().decode().split("\0") if item)
    assert {**env, **variables}.items() <= found.items()
    assert not (tmp_path / "PWN").exists()


def test_nothing_overrides_our_variables(run: Run) -> None:
    ended = run(a_script("echo $CI $A", env={"CI": "no", "A": "new"}), A="old", CI="other")

    assert lines_of_user(ended) == ["true new"]


def test_the_script_itself_is_not_in_the_environment_of_programs(run: Run) -> None:
    ended = run(a_script("env"), buildmill_text="exported before", BUILDMILL_NONCE="n0nce")

    assert "buildmill_text" not in ended.out
    assert "BUILDMILL_NONCE" not in ended.out


@pytest.mark.threat("B07")
@pytest.mark.parametrize(
    "name", ["A B", "", "1A", "A=B", "LD_PRELOAD", "BASH_ENV", "BUILDMILL_STEP", "\u00e9"]
)
def test_a_name_that_is_no_variable_of_users_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        a_script("true", env={name: "x"})


@pytest.mark.parametrize("name", ["PATH", "BUILDMILL_NONCE", "BUILDMILL_WORKSPACE", "CI;x", "BUILDMILL_"])
def test_a_name_that_is_no_variable_of_ours_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        a_script("true", variables={name: "x"})


# What the surroundings may hold


@pytest.mark.threat("B07")
def test_files_named_by_the_environment_are_not_read_by_shells_that_the_script_starts(
    run: Run, way: str, tmp_path: Path
) -> None:
    canary = tmp_path / "rc"
    canary.write_text("echo sourced")
    inner = " ".join(SHELLS[way.split()[0]])

    ended = run(a_script(f"echo ${{BASH_ENV-}}${{ENV-}}; {inner} -c 'echo inner'"), ENV=str(canary))
    also = run(a_script("bash -c 'echo inner'"), BASH_ENV=str(canary))

    assert lines_of_user(ended) == ["", "inner"]
    assert lines_of_user(also)[-1] == "inner"
    assert lines_of_user(also).count("sourced") == (
        1 if way.startswith("bash") else 0
    )  # before our first line


@pytest.mark.threat("B07")
def test_functions_in_the_environment_replace_no_command(run: Run, tmp_path: Path) -> None:
    words = (
        "unset builtin printf trap eval exit set declare export cd mkdir date cat case return test [ : true"
    )
    injected = {f"BASH_FUNC_{word}%%": "() { /usr/bin/touch PWN; }" for word in [*words.split(), "a-b"]}

    ended = run(a_script("cat </dev/null; printf 'fine\\n'; exit 3"), **injected)

    assert (ended.status, lines_of_user(ended)) == (3, ["fine"])
    assert not (tmp_path / "PWN").exists()


@pytest.mark.threat("B07")
def test_shell_options_in_the_environment_change_nothing(run: Run) -> None:
    around = {"SHELLOPTS": "xtrace:nounset:noglob", "BASHOPTS": "nullglob", "PS4": "$(touch PWN)", "IFS": "c"}

    ended = run(
        a_script("x='a b'; for w in $x; do echo $w; done; bash -c 'echo $-'; set | grep -c ^PS4"), **around
    )

    assert ended.status == 0
    assert lines_of_user(ended)[:2] == ["a", "b"]
    assert "x" not in lines_of_user(ended)[2]


def test_home_is_kept_if_it_can_be_written(run: Run, tmp_path: Path) -> None:
    assert lines_of_user(run(a_script("echo $HOME"))) == [str(tmp_path)]

    made = tmp_path / "made here"
    assert lines_of_user(run(a_script('echo $HOME; test -d "$HOME"', env={"HOME": str(made)}))) == [str(made)]


@pytest.mark.parametrize("home", ["", "/", "/proc/nowhere"])
def test_home_is_replaced_if_it_cannot_be_written(run: Run, home: str) -> None:
    ended = run(a_script('test -w "$HOME" && test -d "$HOME" && env | grep ^HOME='), HOME=home)

    assert ended.status == 0
    assert lines_of_user(ended)[0] not in ("HOME=", f"HOME={home}")


def test_a_bare_client_stays_where_it_is_and_a_runner_names_the_workspace(run: Run, tmp_path: Path) -> None:
    (tmp_path / "work here").mkdir()

    assert lines_of_user(run(a_script("pwd"))) == [str(tmp_path)]
    inside = run(a_script("pwd"), BUILDMILL_WORKSPACE=str(tmp_path / "work here"), CDPATH="/tmp")
    assert lines_of_user(inside) == [str(tmp_path / "work here")]
    assert run(a_script("echo ran"), BUILDMILL_WORKSPACE="/nowhere").out == ""


@pytest.mark.threat("B10")
def test_sections_are_marked_only_for_who_brought_a_nonce(run: Run) -> None:
    before = int(time.time()) * 1000

    quiet = run(a_script("true"))
    marked = run(a_script("echo out; false", name="a ] $(id) %s"), BUILDMILL_NONCE="n0nce")

    assert "buildmill" not in quiet.out
    first, *_, last = marked.out.splitlines()
    assert first.startswith("##[buildmill:start n0nce a ] $(id) %s ")
    assert last.startswith("##[buildmill:end n0nce a ] $(id) %s ")
    assert before <= int(first.rstrip("]").split()[-1]) <= int(last.rstrip("]").split()[-1]) < before + 60_000
    assert marked.status == 1


@pytest.mark.parametrize("name", ["a\nb", "a\x1b]0;x", "a\x7f"])
def test_a_name_with_control_characters_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="control"):
        a_script("true", name=name)


# Half a download


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_cut_short_executes_nothing(shell: str, tmp_path: Path) -> None:
    script = a_script("touch PWN\n" * 3, env={"A": "touch PWN"})
    whole = script.encode()
    (tmp_path / "home").mkdir()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "BUILDMILL_NONCE": "n"}

    for length in [*range(0, len(whole) - 1, 97), *range(len(whole) - 60, len(whole) - 1)]:
        ended = subprocess.run(
            SHELLS[shell], input=whole[:length], cwd=tmp_path, env=env, capture_output=True, timeout=10
        )
        assert ended.stdout == b"", length
        assert not (tmp_path / "PWN").exists(), length

    subprocess.run(SHELLS[shell], input=whole[:-1], cwd=tmp_path, env=env, capture_output=True, timeout=10)
    assert (tmp_path / "PWN").exists()  # only the last newline is missing


# Signals


def signalled(way: str, place: Path, run_script: str) -> Ended:
    env = {"PATH": os.environ["PATH"], "HOME": str(place)}
    with start(a_script(run_script), way, place, env) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in (b"ready\n", b""):
            pass
        os.killpg(process.pid, signal.SIGTERM)
        out, err = process.communicate(timeout=20)
    return Ended(process.returncode, out.decode(), err.decode())


def test_a_terminated_script_ends_with_143_and_does_not_print_itself(way: str, tmp_path: Path) -> None:
    ended = signalled(way, tmp_path, "MARK=secret-looking; sh -c 'echo ready; exec sleep 30'")

    assert ended.status == 143
    assert "secret-looking" not in ended.err
    assert "buildmill" not in ended.err


def test_the_users_own_trap_decides_how_a_terminated_script_ends(way: str, tmp_path: Path) -> None:
    ended = signalled(
        way, tmp_path, "trap 'echo cleaning; exit 9' TERM; sh -c 'echo ready; exec sleep 30' & wait"
    )

    assert ended.status == 9
    assert "cleaning" in ended.out


def test_a_terminated_script_still_cleans_up_at_its_exit(way: str, tmp_path: Path) -> None:
    ended = signalled(way, tmp_path, "trap 'echo cleaning' EXIT; sh -c 'echo ready; exec sleep 30'")

    assert ended.status == 143
    assert "cleaning" in ended.out
