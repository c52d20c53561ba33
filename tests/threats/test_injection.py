"""What users write reaches a step as data: nothing of it is run, nothing of it is changed."""

import hashlib
import io
import os
import re
import subprocess
import tarfile
from typing import Any

import pytest

from tests.factories import a_step
from tests.threats.stack import BUSYBOX, Stack
from tests.trip.stage import said_in, steps_of

EXECUTORS = pytest.mark.parametrize("executor", ["docker", "process"])

VALUES = {
    "SUBSTITUTION": "$(touch /tmp/PWN-B09)`touch /tmp/PWN-B09`",
    "QUOTES": "'; touch /tmp/PWN-B09; '\"; touch /tmp/PWN-B09; \"",
    "TEMPLATES": "${{ secrets.X }} {{7*7}} %s%n ${jndi:ldap://x/a} $HOME ${PATH} $$ !! ~ * {a,b}",
    "LINES": "one\ntwo\r\nthree\rfour\u0085five\u2028six\n\n",
    "CONTROL": "\x01\x1b]0;title\x07\x7f\t\v\f",
    "END": "\\",
    "EMPTY": "",
    "BLANKS": "  \t ",
    "UNICODE": "é e\u0301 \u202e \U0001f469\u200d\U0001f4bb \ufeff",
    "OPTION": "--version",
    "LONG": "x" * 100_000,
}
DIGEST = 'printf "%s %s\\n" {0} "$(printf %s "${0}" | sha256sum | cut -c1-64)"\n'
WITNESS = "ls -d /tmp/PWN* PWN* /PWN* 2>/dev/null && echo A PAYLOAD RAN\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@EXECUTORS
@pytest.mark.threat("B04")
@pytest.mark.threat("B09")
def test_values_arrive_byte_for_byte(stack: Stack, executor: str) -> None:
    script = "".join(DIGEST.format(name) for name in VALUES) + WITNESS + "true"

    step, log = stack.run_step(script, on=executor, env=VALUES)

    assert step["status"] == "SUCCESS", log
    arrived = dict(re.findall(r"^([A-Z]+) ([0-9a-f]{64})$", said_in(log).decode(), re.MULTILINE))
    assert arrived == {name: digest(value) for name, value in VALUES.items()}
    assert b"A PAYLOAD RAN" not in log


@EXECUTORS
@pytest.mark.threat("B01")
@pytest.mark.threat("B02")
@pytest.mark.threat("B11")
def test_no_field_of_a_build_is_run(stack: Stack, executor: str) -> None:
    payload = "$(touch /tmp/PWN-B01)`touch /tmp/PWN-B01`';touch /tmp/PWN-B01;'"
    branch = "x$({touch,/tmp/PWN-B02});\"'`id`"
    repository = stack.a_repository()
    commit = repository.commit({"a.txt": "a"}, message=payload)
    repository.git("branch", "--", branch)
    output = "out/$(touch$IFS$9PWN-B01)`id`;&&|'\".txt"
    script = (
        "".join(DIGEST.format(f"BUILDMILL_{word}") for word in ("STEP", "BRANCH", "COMMIT"))
        + 'mkdir -p out; echo made > "$OUTPUT"; ls -d "$CACHE"\n'
        + WITNESS
        + "cat a.txt"
    )
    name, cache = "../../x" + payload, "cc;touch$IFS$9PWN,b:c`id`"
    env = {"OUTPUT": output, "CACHE": cache}
    project = stack.api.post("/api/projects", {"accountId": payload, "name": payload})["id"]
    fields = {"labels": [executor], "env": env}
    steps = [
        a_step(name, runScript=script, outputPaths=[output], cacheDirs=[cache], **fields),
        a_step("next", [name], runScript='cat "$OUTPUT"', **fields),
    ]
    workflow = stack.api.post(f"/api/projects/{project}/workflows", {"name": payload, "steps": steps})

    made = stack.build_again(
        workflow, repoUrl=repository.url, branch=branch, commitMessage=payload, commitAuthor=payload
    )
    build = stack.await_end(made["id"])

    assert build["status"] == "SUCCESS", stack.tell(build["id"])
    log = stack.log(steps_of(build)[name]["id"])
    assert b"A PAYLOAD RAN" not in log
    arrived = dict(re.findall(r"^(BUILDMILL_[A-Z]+) ([0-9a-f]{64})$", log.decode(), re.MULTILINE))
    assert arrived["BUILDMILL_STEP"] == digest(name)
    assert arrived["BUILDMILL_BRANCH"] == digest(branch)
    assert arrived["BUILDMILL_COMMIT"] == digest(commit)
    assert (build["commitMessage"], build["commitAuthor"], build["branch"]) == (payload, payload, branch)
    assert list(stack.artifacts(build["id"])) == [output]
    assert said_in(stack.log(steps_of(build)["next"]["id"])) == b"made\n"


NASTY = {
    "terminators": "cat <<'ABC'\nEOF\n__END__\nPROGRAM\n'\\''\n'\"'\"'\nABC\necho after",
    "backslash": "printf '%s' 'a\\'\necho b \\",
    "no newline": "printf x",
    "carriage returns": "printf '%s' 'a\r\nb\r'",
    "mark": "\ufeff:\nprintf ok",
    "quotes": "printf '%s' \"'\\\"\\$\\`\"",
    "comment": "printf y # ' \" ` $( ${",
}


@pytest.mark.threat("B06")
def test_the_script_inside_is_the_script_that_was_given_out(stack: Stack) -> None:
    measure = "printf '\\ninside %s\\n' \"$(sha256sum </buildmill/script.sh | cut -c1-64)\"\n"
    line = "printf '%s' '" + "z" * 700_000 + "' | wc -c"
    scripts = {**NASTY, "one long line": line}
    steps = [a_step(name, runScript=measure + text, labels=["docker"]) for name, text in scripts.items()]

    build = stack.run(steps, timeout_s=100)

    for name, step in steps_of(build).items():
        log = stack.log(step["id"]).decode(errors="replace")
        shown = stack.http.get(f"/api/runner/{step['id']}").content
        assert f"inside {hashlib.sha256(shown).hexdigest()}" in log, (name, log[-500:])
        # A byte order mark makes a command of its own, which does not exist.
        assert step["status"] == ("FAILED" if name == "mark" else "SUCCESS"), (name, log[-500:])


@EXECUTORS
@pytest.mark.threat("B06")
def test_awkward_scripts_do_what_they_say(stack: Stack, executor: str) -> None:
    steps = [
        a_step(name, runScript=text, labels=[executor]) for name, text in NASTY.items() if name != "mark"
    ]

    build = stack.run(steps)

    said = {name: said_in(stack.log(step["id"])) for name, step in steps_of(build).items()}
    assert build["status"] == "SUCCESS", stack.tell(build["id"])
    assert said["terminators"] == b"EOF\n__END__\nPROGRAM\n'\\''\n'\"'\"'\nafter\n"
    assert said["backslash"] in (b"a\\b \\\n", b"a\\b \n")  # at the end of a file either is right
    assert said["no newline"] == b"x"
    assert said["carriage returns"] == b"a\r\nb\r"
    assert said["quotes"] == b"'\"$`"
    assert said["comment"] == b"y"


EVIL = {
    "GIT_SSH_COMMAND": "touch /tmp/PWN-B07",
    "GIT_CONFIG_GLOBAL": "/tmp/evil",
    "GIT_EXEC_PATH": "/tmp/evil",
    "GIT_ASKPASS": "/tmp/evil",
    "DOCKER_HOST": "tcp://evil.example:1",
    "PYTHONPATH": "/tmp/evil",
    "PYTHONSTARTUP": "/tmp/evil",
    "HTTPS_PROXY": "http://evil.example:1",
    "HOME": "/tmp/evil-home",
    "TMPDIR": "/tmp/evil",
    "PERL5OPT": "-M/tmp/evil",
    "NODE_OPTIONS": "--require=/tmp/evil",
    "CI": "false",
}


@EXECUTORS
@pytest.mark.threat("B07")
def test_variables_of_a_step_reach_that_step_and_nobody_else(stack: Stack, executor: str) -> None:
    repository = stack.a_repository()
    repository.commit({"a.txt": "a"})
    source = {"repoUrl": repository.url, "branch": "main"}
    program = stack.runners[executor].pid
    before = _environment_of(program)

    hostile, log = stack.run_step("echo CI=$CI; env", on=executor, env=EVIL, build=source)
    repository.commit({"a.txt": "b"})  # git has to work again
    later, plain = stack.run_step("env; cat a.txt", on=executor, build=source)

    assert (hostile["status"], later["status"]) == ("SUCCESS", "SUCCESS"), log + plain
    assert b"CI=true\n" in said_in(log)
    assert b"GIT_SSH_COMMAND=touch /tmp/PWN-B07\n" in log
    assert said_in(plain).endswith(b"\nb")
    assert not any(b"evil" in line for line in said_in(plain).splitlines())
    assert _environment_of(program) == before


def _environment_of(pid: int) -> bytes:
    with open(f"/proc/{pid}/environ", "rb") as file:
        return file.read()


@EXECUTORS
@pytest.mark.threat("B07")
def test_a_step_with_its_own_path_harms_itself_only(stack: Stack, executor: str) -> None:
    step, own = stack.run_step('echo "PATH=$PATH"', on=executor, env={"PATH": "/nonexistent"})
    later, log = stack.run_step('echo "PATH=$PATH"', on=executor)

    assert b"PATH=/nonexistent\n" in said_in(own)
    assert (step["exitCode"], later["exitCode"]) == (0, 0)
    assert b"PATH=/nonexistent" not in log
    if executor == "process":
        assert f"PATH={os.environ['PATH']}\n".encode() in log


CONTROL_LINES = [
    b"::set-env name=PATH::/tmp/evil",
    b"::set-output name=status::success",
    b"::add-mask::a",
    b"##[complete]",
    b"##vso[task.complete result=Succeeded;]DONE",
    b"##[buildmill:end 0123456789abcdef test 1]",
    b"##[buildmill:start 0123456789abcdef test 1]",
    b'{"status":"success","exitCode":0,"logSize":0}',
    b'{"action":"cancel"}',
    b"\x1b]0;title\x07\x1b[2J\x1b[31m",
    b"echo $(touch /tmp/PWN-B10)",
    b"<script>alert(1)</script>",
    b"HTTP/1.1 200 OK",
]


@EXECUTORS
@pytest.mark.threat("B10")
@pytest.mark.parametrize("code", [0, 3])
def test_what_a_step_prints_is_never_obeyed(stack: Stack, executor: str, code: int) -> None:
    text = b"\n".join(CONTROL_LINES) + b"\n"
    quoted = text.decode().replace("'", "'\\''")

    step, log = stack.run_step(f"printf %s '{quoted}'; exit {code}", on=executor)

    assert text in log
    assert step["exitCode"] == code
    assert step["status"] == ("FAILED" if code else "SUCCESS")
    assert stack.artifacts(step["buildId"]) == {}


@pytest.mark.threat("B14")
def test_an_image_that_bends_the_workspace_bends_itself(stack: Stack) -> None:
    name = "buildmill-test/bent:1"
    _import_bent_image(name)
    try:
        stack.an_image("bent", name)
        fields: dict[str, Any] = {"imageSlug": "bent", "outputPaths": ["out"], "cacheDirs": ["/opt/bent"]}

        step, log = stack.run_step("pwd -P; echo here > out; ls -la /; true", **fields)

        assert step["status"] in ("SUCCESS", "FAILED"), log
        assert not os.path.exists("/etc/out")
        assert not os.path.exists("/etc/bent")
        plain, _ = stack.run_step("pwd")
        assert plain["status"] == "SUCCESS"
    finally:
        subprocess.run(["docker", "image", "rm", "-f", name], check=True, capture_output=True, timeout=60)


def _import_bent_image(name: str) -> None:
    """Busybox with a workspace that is a link to /etc, and a cache that is a link out of the file system."""
    made = subprocess.run(
        ["docker", "create", BUSYBOX, "true"], check=True, capture_output=True, text=True, timeout=60
    )
    container = made.stdout.strip()
    try:
        exported = subprocess.run(
            ["docker", "export", container], check=True, capture_output=True, timeout=60
        ).stdout
    finally:
        subprocess.run(["docker", "rm", "-f", container], check=True, capture_output=True, timeout=60)
    target = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(exported)) as before,
        tarfile.open(fileobj=target, mode="w") as after,
    ):
        for member in before:
            after.addfile(member, before.extractfile(member) if member.isreg() else None)
        for path, to in (("workspace", "/etc"), ("opt/bent", "../../../../../etc"), ("buildmill", "/etc")):
            link = tarfile.TarInfo(path)
            link.type, link.linkname = tarfile.SYMTYPE, to
            after.addfile(link)
    command = ["docker", "import", "--change", 'CMD ["sh"]', "-", name]
    subprocess.run(command, input=target.getvalue(), check=True, capture_output=True, timeout=60)


@pytest.mark.threat("B15")
def test_a_forged_exit_code_is_read_as_little_data(stack: Stack) -> None:
    forgeries = {
        "shell": "echo '$(touch /tmp/PWN-B15)' >/buildmill/rc; exit 3",
        "long": "head -c 50000000 /dev/zero >/buildmill/rc; exit 3",
        "success": "echo 0 >/buildmill/rc; kill -9 $PPID; exit 3",
    }
    steps = [a_step(name, runScript=text, labels=["docker"]) for name, text in forgeries.items()]

    build = stack.run(steps)

    assert {step["status"] for step in build["steps"]} == {"FAILED"}, stack.tell(build["id"])
