"""Runs the fuzzer against a coordinator process of its own: `scripts/fuzz` calls this.

The coordinator wants tokens, so that the fuzzer can also see whether one is really needed. Something of every
kind is made first: without real ids most requests would end at a 404.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FUZZER = ROOT / ".venv-fuzz" / "bin" / "schemathesis"
EXCEPTIONS = HERE / "fuzz_exceptions.toml"
STARTUP_S = 60
LONGEST_RUN_S = 6 * 3600
# What the fuzzer lets through for requests that fit the schema, unless it is told otherwise.
USUAL_STATUSES = ["2xx", "3xx", 401, 403, 404, 409, 429, "5xx"]


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="buildmill-fuzz-") as folder:
        work = Path(folder)
        with running_coordinator(work / "data") as client:
            secret, seeds = seed(client, (work / "data/keys/registration-token").read_text().strip())
            config = work / "schemathesis.toml"
            config.write_text(configuration(seeds))
            environment = {
                **os.environ,
                "USER_TOKEN": client.headers["Authorization"].removeprefix("Bearer "),
                "RUNNER_SECRET": secret,
                "ENROLMENT_TOKEN": (work / "data/keys/registration-token").read_text().strip(),
                "SCHEMATHESIS_HOOKS": "fuzz_hooks",
                "PYTHONPATH": str(HERE),
                "NO_PROXY": "127.0.0.1",
            }
            command = [str(FUZZER), "--config-file", str(config), "run", f"{client.base_url}/openapi.json"]
            command += ["--max-examples", str(options.examples), "--seed", str(options.seed), "--no-color"]
            command += ["--phases", options.phases, "--workers", "1", "--continue-on-failure"]
            command += ["--request-timeout", "20", "--warnings", "off", "--generation-database", "none"]
            command += options.more
            code = subprocess.run(
                command,
                cwd=work,
                env=environment,
                timeout=LONGEST_RUN_S,
                check=False,
                stdin=subprocess.DEVNULL,
            ).returncode
            alive = client.get("/readyz").status_code == 200
    if not alive:
        print("fuzz: the coordinator no longer answers", file=sys.stderr)
    return code if alive else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description="Hold a coordinator to its specification."
    )
    parser.add_argument("--examples", type=int, default=30, help="test cases per operation (30)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the same seed, the same cases")
    parser.add_argument("--phases", default="examples,coverage,fuzzing,stateful", help="which phases to run")
    options, options.more = parser.parse_known_args()
    return options


@contextlib.contextmanager
def running_coordinator(data: Path) -> Iterator[httpx.Client]:
    """A coordinator process that wants tokens, and the administrator's client to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "coordinator", "coordinator", "--auth", "token"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [*command, "--data", str(data), "--port", str(port)],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
                _wait_until_ready(process, client)
                token = (data / "keys" / "admin-token").read_text().strip()
                client.headers["Authorization"] = f"Bearer {token}"
                yield client
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace")[-20_000:])


def _wait_until_ready(process: "subprocess.Popen[bytes]", client: httpx.Client) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/readyz").status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError("the coordinator did not come up")


def seed(client: httpx.Client, registration_token: str) -> tuple[str, dict[str, list[str]]]:
    """Something of every kind; returns a runner's secret and the values worth trying, by parameter."""
    project = _made(client, "/api/projects", {"accountId": "acme", "name": "seeded"})["id"]
    client.patch(f"/api/projects/{project}", json={"repoUrl": "https://git.example/owner/name"})
    image_of_all = {"slug": "base", "imageUrl": "alpine", "public": True}
    image = _made(client, "/api/docker-images", image_of_all)["id"]
    step = {"name": "one", "imageSlug": "base", "dependsOn": [], "runScript": "true"}
    steps = [{**step, "cacheDirs": [], "outputPaths": []}]
    workflow = _made(client, f"/api/projects/{project}/workflows", {"name": "w", "steps": steps})["id"]
    builds = [
        _made(client, f"/api/projects/{project}/builds", {"workflowId": workflow})["id"] for _ in range(4)
    ]
    found = [client.get(f"/api/builds/{build}").json()["steps"][0]["id"] for build in builds]
    _made(client, f"/api/runner/{found[0]}/complete", {"status": "success", "logs": "hello\n"}, status=200)
    cancelled = _made(client, f"/api/builds/{builds[3]}/cancel", None, status=202)["cancelId"]
    [tenant] = [one["id"] for one in client.get("/api/tenants").json() if one["accountId"] == "acme"]
    wish, header = {"project_id": project, "git_branch": "main"}, {"X-Tenant-ID": tenant}
    builds += [_made(client, "/api/v1/builds", wish, headers=header)["id"] for _ in range(3)]
    credential = {"Authorization": f"Bearer {registration_token}"}
    runner = _made(client, "/api/runners", {"name": "fuzzed"}, headers=credential)
    return runner["runnerSecret"], {
        "path.id": [project, *builds, *found, image, cancelled],
        "path.workflowId": [workflow],
        "path.stepId": found,
        "header.X-Tenant-ID": [tenant],
        "query.accountId": ["acme"],
        "query.projectId": [project],
    }


def _made(client: httpx.Client, path: str, body: Any, *, status: int = 201, **more: Any) -> Any:
    answer = client.post(path, json=body, **more)
    if answer.status_code != status:
        raise RuntimeError(f"{path} answered {answer.status_code}: {answer.text[:500]}")
    return answer.json()


def configuration(seeds: dict[str, list[str]]) -> str:
    """The fuzzer's settings: credentials per scheme, known ids among the made-up ones, and our exceptions."""
    lines = [
        "[generation]",
        "allow-x00 = false  # NUL is refused in every text, which schemas have no word for",
    ]
    lines.append("[auth.openapi]")
    for scheme, variable in (
        ("user", "USER_TOKEN"),
        ("runner", "RUNNER_SECRET"),
        ("enrolment", "ENROLMENT_TOKEN"),
    ):
        lines.append(f'{scheme} = {{ bearer = "${{{variable}}}" }}')
    for name, values in seeds.items():
        lines += [f'[dictionaries."{name.replace(".", "-")}"]', f"values = {json.dumps(values)}"]
    lines.append("[parameters]")
    for name in seeds:
        lines.append(f'"{name}" = {{ dictionary = "{name.replace(".", "-")}", probability = 0.6 }}')
    for exception in tomllib.loads(EXCEPTIONS.read_text()).get("exception", []):
        lines += ["[[operations]]", f"include-name = {json.dumps(exception['operations'])}"]
        check = f"checks.{exception['check']}"
        if "also" in exception:
            lines.append(f"{check}.expected-statuses = {json.dumps(USUAL_STATUSES + exception['also'])}")
        else:
            lines.append(f"{check}.enabled = false")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
