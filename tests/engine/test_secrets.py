"""Secrets in real containers: every byte arrives, the engine sees none, and no spelling passes the mask."""

import hashlib
import json
from pathlib import Path

import docker
import pytest

from runner.executor.docker import DockerExecutor
from runner.mask import Masker, needles_for
from runner.mounts import mounts_below
from tests.factories import a_step
from tests.runner.jobs import a_job, begin, log_of
from tests.runner.test_secret_files import NASTY
from tests.trip.stage import an_engine_stage, said_in, steps_of

pytestmark = pytest.mark.engine

PRINT = """\
printf %s "$NASTY" | sha256sum | cut -d' ' -f1
wc -c </buildmill/secrets
echo "$NASTY"
printf %s "$NASTY" | base64
printf 'x%s' "$NASTY" | base64
printf 'xy%s' "$NASTY" | base64 | tr -d '\\n'; echo
printf %s "$NASTY" | od -An -v -tx1 | tr -d ' \\n'; echo
printf %s "$NASTY" | while IFS= read -r line; do printf '    %s\\r\\n' "$line"; done
env
echo over
"""
IN_PYTHON = """\
python3 - <<'PROGRAM'
import base64, json, os, shlex, urllib.parse
value = os.environ["NASTY"]
for text in (json.dumps(value), json.dumps(value, ensure_ascii=False), urllib.parse.quote(value),
             urllib.parse.quote_plus(value), shlex.quote(value), value.encode().hex().upper(),
             base64.urlsafe_b64encode(value.encode()).decode(), base64.encodebytes(value.encode()).decode()):
    print(text)
PROGRAM
"""


@pytest.mark.threat("G03")
@pytest.mark.threat("G06")
@pytest.mark.threat("G08")
@pytest.mark.parametrize("user", ["root", "image"])
@pytest.mark.parametrize(
    ("image", "script"), [("buildmill/busybox:1", PRINT), ("buildmill/python:3", PRINT + IN_PYTHON)]
)
def test_nasty_bytes_arrive_unseen_and_are_masked_in_every_spelling(
    executor: DockerExecutor, runner: str, tmp_path: Path, image: str, script: str, user: str
) -> None:
    job = a_job(tmp_path, script, runner=runner, image=image, user=user, secrets={"NASTY": NASTY})
    api = docker.APIClient(version="auto")
    try:
        begin(executor, job)
        shown = json.dumps(api.inspect_container(job.name))
        ended = executor.wait(job, timeout_s=60)
        shown += json.dumps(api.inspect_container(job.name)) + executor.diagnostics(job).decode()
    finally:
        api.close()
    executor.destroy(job)

    assert ended is not None and ended.succeeded, log_of(job)
    said = (job.attempt_dir / "log").read_bytes()
    assert said.splitlines()[:2] == [hashlib.sha256(NASTY.encode()).hexdigest().encode(), b"0"]
    assert "touch /tmp/PWN" not in shown and "NASTY" not in shown
    assert mounts_below(tmp_path) == []
    assert not Path("/tmp/PWN").exists()
    masker = Masker(needles_for(NASTY.encode()))
    masked = masker.feed(said) + masker.finish()
    for trace in (b"it's", b"touch /tmp", b"touch%20", b"~ #", NASTY[:30].encode().hex().encode()):
        assert trace in said or image.endswith("box:1"), trace
        assert trace not in masked, masked.decode(errors="replace")


def test_a_step_that_never_read_its_secrets_leaves_none(
    executor: DockerExecutor, runner: str, tmp_path: Path
) -> None:
    job = a_job(tmp_path, "true", runner=runner, secrets={"TOKEN": "canary-of-the-engine"})
    executor.create(job)
    placed = [path for path in (tmp_path / "state" / "secrets").rglob("*") if path.is_file()]

    executor.destroy(job)

    assert len(placed) == 1
    assert mounts_below(tmp_path) == []


def test_a_second_life_starts_what_the_first_one_made(
    executor: DockerExecutor, runner: str, tmp_path: Path
) -> None:
    job = a_job(tmp_path, 'echo "${#TOKEN}"', runner=runner, secrets={"TOKEN": "canary-of-the-engine"})
    executor.create(job)
    executor._secret_files.remove(job.name)  # as a restart of the machine does it

    begin(executor, job)

    ended = executor.wait(job, timeout_s=60)
    assert ended is not None and ended.succeeded, log_of(job)
    assert log_of(job) == "20\n"
    executor.destroy(job)


@pytest.mark.threat("G01")
def test_a_container_that_is_adopted_after_a_kill_stays_masked() -> None:
    canary = "canary-1414213562373095"
    with an_engine_stage() as stage:
        project = stage.a_project()
        path = f"/api/projects/{project}/secrets/TOKEN"
        assert stage.api.client.put(path, json={"value": canary}).status_code == 201
        script = 'echo begun; for n in $(seq 0 39); do echo "$n $TOKEN"; sleep 0.2; done'
        step = a_step("one", runScript=script, secrets=["TOKEN"])
        runner = stage.a_runner_process(executor="docker")
        build = stage.submit([step], project_id=project)
        step_id = steps_of(build)["one"]["id"]

        stage.await_log(step_id, b"\n3 ***\n", 60)
        runner.kill()
        assert stage.api.client.delete(path).status_code == 204
        heir = stage.a_runner_process(executor="docker")
        build = stage.await_end(build["id"])

        assert build["status"] == "SUCCESS", stage.tell(build["id"])
        assert said_in(stage.log(step_id)) == b"begun\n" + b"".join(b"%d ***\n" % n for n in range(40))
        assert steps_of(build)["one"]["attempt"] == 1
        assert canary not in runner.output + heir.output
