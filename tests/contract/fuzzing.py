"""Runs the fuzzer against a coordinator process of its own: `scripts/fuzz` calls this.

The coordinator wants tokens, so that the fuzzer can also see whether one is really needed. Something of every
kind is made first: without real ids most requests would end at a 404.
"""

import argparse
import contextlib
import itertools
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from coordinator.app import ALL_ENDPOINTS
from tests.contract.fuzz_tenants import Filling, FuzzTenant, gone_from, rows_in, telling_words

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FUZZER = ROOT / ".venv-fuzz" / "bin" / "schemathesis"
EXCEPTIONS = HERE / "fuzz_exceptions.toml"
STARTUP_S = 60
LONGEST_RUN_S = 6 * 3600
# What the fuzzer lets through for requests that fit the schema, unless it is told otherwise.
USUAL_STATUSES = ["2xx", "3xx", 401, 403, 404, 409, 429, "5xx"]

# A limit would answer most of what the fuzzer asks.
UNLIMITED = {
    "BUILDMILL_RATE_LIMIT": "0",
    "BUILDMILL_RATE_LIMIT_PEER": "0",
    "BUILDMILL_ACCESS_TOKEN_MINUTES": "1440",
}
# Where the fuzzer finds what it shows for each scheme of the specification.
SCHEMES = {"user": "USER_TOKEN", "runner": "RUNNER_SECRET", "enrolment": "ENROLMENT_TOKEN"}
# Who asks beside another tenant, those who may the least first.
ROLES = ("nobody", "viewer", "program", "developer", "admin", "owner")
# These end the credential that asks, or would with the right words.
ENDING = {"POST /api/v1/auth/logout", "POST /api/v1/auth/password"}


def main() -> int:
    options = _options()
    with tempfile.TemporaryDirectory(prefix="buildmill-fuzz-") as folder:
        work = Path(folder)
        with running_coordinator(work / "data") as client:
            fuzz = fuzz_roles if options.roles else fuzz_operator
            failed = fuzz(options, work, client)
            if client.get("/readyz").status_code != 200:
                failed.append("the coordinator no longer answers")
    for name in failed:
        print(f"fuzz: {name}", file=sys.stderr)
    return 1 if failed else 0


def fuzz_operator(options: argparse.Namespace, work: Path, client: httpx.Client) -> list[str]:
    """Everything, as who may do everything; what went wrong."""
    enrolment = (work / "data/keys/registration-token").read_text().strip()
    secret, seeds = seed(client, enrolment)
    credentials = {
        "USER_TOKEN": client.headers["Authorization"].removeprefix("Bearer "),
        "RUNNER_SECRET": secret,
        "ENROLMENT_TOKEN": enrolment,
    }
    is_right = run_fuzzer(options, work, client, seeds, credentials, ["--phases", options.phases])
    return [] if is_right else ["as the operator: see above"]


def fuzz_roles(options: argparse.Namespace, work: Path, client: httpx.Client) -> list[str]:
    """As everybody who belongs to one tenant and has nothing to do with another; what went wrong.

    Whoever may do the least begins: an owner may well delete what the others would have looked at.
    """
    database = work / "data" / "buildmill.db"
    mine = Filling(client, "acme").fill()
    before = rows_in(database)
    theirs = Filling(client, f"rivals-{secrets.token_hex(4)}").fill()
    only_theirs = rows_in(database) - before
    hidden = telling_words(only_theirs) - telling_words(before)
    hidden |= {theirs.word, theirs.word.upper(), theirs.account, *theirs.told_once}
    # mostly one's own: what is refused at the door tells little
    seeds = {name: mine.values[name] * 3 + theirs.values[name] for name in mine.values}
    known = {"hidden": sorted(hidden), "twins": _twins(mine, theirs), "known": _in_bodies(seeds)}
    (work / "tenants.json").write_text(json.dumps(known))
    failed = []
    operations = operations_of(client)
    for role in (role for role in ROLES if role in options.roles):
        chosen = share_of(role, operations, part=options.part, share=options.share)
        for some in (chosen - ENDING, chosen & ENDING):  # what ends the credential comes last
            if some and not fuzz_role(options, work, client, role, mine, seeds, some):
                failed.append(f"as {role}: see above")
    failed += [f"changed for the other tenant: {row}" for row in gone_from(only_theirs, rows_in(database))]
    return failed


def fuzz_role(
    options: argparse.Namespace,
    work: Path,
    client: httpx.Client,
    role: str,
    mine: FuzzTenant,
    seeds: dict[str, list[str]],
    operations: set[str],
) -> bool:
    """Whether the coordinator held to its specification and to the walls between tenants."""
    print(f"fuzz: {len(operations)} operations as {role}", flush=True)
    token = mine.credentials.get(role)
    more = {"FUZZ_TENANTS": str(work / "tenants.json")}
    if token is not None:
        runner, enrolment = mine.credentials["runner"], mine.credentials["enrolment"]
        more |= {"USER_TOKEN": token, "RUNNER_SECRET": runner, "ENROLMENT_TOKEN": enrolment}
    wish = ["--phases", "coverage,fuzzing"]
    for name in sorted(operations):
        wish += ["--include-name", name]
    is_right = run_fuzzer(options, work, client, seeds, more, wish)
    if token is None or operations & ENDING:
        return is_right
    who = client.get("/api/v1/auth/me", headers={"Authorization": f"Bearer {token}"})
    if who.status_code != 200:  # what was found after it stopped to count was found by a stranger
        print(f"fuzz: the credential of {role} has stopped to count", flush=True)
    return is_right and who.status_code == 200


def operations_of(client: httpx.Client) -> list[str]:
    """All but the one that the fuzzer has the specification from."""
    paths = client.get("/openapi.json").json()["paths"]
    names = sorted(f"{method.upper()} {path}" for path, item in paths.items() for method in item)
    names.remove("GET /openapi.json")
    return names


def share_of(role: str, operations: Sequence[str], *, part: int, share: int) -> set[str]:
    """Every so many-th operation: each part takes others, and so does each role."""
    first = ROLES.index(role) + part
    return {name for number, name in enumerate(operations) if (number + first) % share == 0}


def _twins(mine: FuzzTenant, theirs: FuzzTenant) -> dict[str, str]:
    """Both were made in the same way, so that their things stand at the same places."""
    names = [name for name in mine.values if name != "header.X-Tenant-ID"]
    pairs = [zip(mine.values[name], theirs.values[name], strict=True) for name in names]
    return dict(itertools.chain.from_iterable(pairs))


def _in_bodies(seeds: dict[str, list[str]]) -> dict[str, list[str]]:
    workflows = seeds["workflows"]
    fields = {"project_id": seeds["projects"], "build_id": seeds["builds"]}
    return fields | dict.fromkeys(("workflowId", "defaultWorkflowId", "default_workflow_id"), workflows)


def run_fuzzer(
    options: argparse.Namespace,
    work: Path,
    client: httpx.Client,
    seeds: dict[str, list[str]],
    more: dict[str, str],
    wish: list[str],
) -> bool:
    """Whether it found nothing; `more` is for its environment, credentials among it."""
    config = work / "schemathesis.toml"
    config.write_text(configuration(seeds, [scheme for scheme in SCHEMES if SCHEMES[scheme] in more]))
    environment = {**os.environ, **more, "SCHEMATHESIS_HOOKS": "fuzz_hooks", "PYTHONPATH": str(HERE)}
    command = [str(FUZZER), "--config-file", str(config), "run", f"{client.base_url}/openapi.json"]
    command += ["--max-examples", str(options.examples), "--seed", str(options.seed), "--no-color"]
    command += [*wish, "--workers", "1", "--continue-on-failure", "--request-timeout", "20"]
    command += ["--warnings", "off", "--generation-database", "none", *options.more]
    ended = subprocess.run(
        command,
        cwd=work,
        env={**environment, "NO_PROXY": "127.0.0.1"},
        timeout=LONGEST_RUN_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return ended.returncode == 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description="Hold a coordinator to its specification."
    )
    parser.add_argument("--examples", type=int, default=30, help="test cases per operation (30)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="the same seed, the same cases")
    parser.add_argument("--phases", default="examples,coverage,fuzzing,stateful", help="which phases to run")
    parser.add_argument(
        "--as",
        dest="roles",
        nargs="+",
        default=[],
        choices=[*ROLES, "everybody"],
        help="ask as these, beside another tenant, instead of as the operator",
    )
    parser.add_argument("--share", type=int, default=1, help="each role takes every so many-th operation (1)")
    parser.add_argument("--part", type=int, default=0, help="which of these shares (0)")
    options, options.more = parser.parse_known_args()
    if "everybody" in options.roles:
        options.roles = list(ROLES)
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
            env={**os.environ, **UNLIMITED},
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


def configuration(seeds: dict[str, list[str]], schemes: list[str]) -> str:
    """The fuzzer's settings: credentials per scheme, known ids among the made-up ones, and our exceptions."""
    lines = [
        "[generation]",
        "allow-x00 = false  # NUL is refused in every text, which schemas have no word for",
    ]
    if schemes:
        lines.append("[auth.openapi]")
    lines += [f'{scheme} = {{ bearer = "${{{SCHEMES[scheme]}}}" }}' for scheme in schemes]
    for name, values in seeds.items():
        lines += [f'[dictionaries."{name.replace(".", "-")}"]', f"values = {json.dumps(values)}"]
    lines.append("[parameters]")
    lines += [f'"{name}" = {_drawn_from(name)}' for name in seeds if "." in name]
    for operation, path in _paths():
        for before, segment in itertools.pairwise(path.split("/")):
            if segment.startswith("{") and before in seeds:
                lines += ["[[operations]]", f"include-name = {json.dumps(operation)}"]
                lines += [f'parameters = {{ "path.{segment.strip("{}")}" = {_drawn_from(before)} }}']
    for exception in tomllib.loads(EXCEPTIONS.read_text()).get("exception", []):
        lines += ["[[operations]]", f"include-name = {json.dumps(exception['operations'])}"]
        check = f"checks.{exception['check']}"
        if "also" in exception:
            lines.append(f"{check}.expected-statuses = {json.dumps(USUAL_STATUSES + exception['also'])}")
        else:
            lines.append(f"{check}.enabled = false")
    return "\n".join(lines) + "\n"


def _drawn_from(name: str) -> str:
    return f'{{ dictionary = "{name.replace(".", "-")}", probability = 0.7 }}'


def _paths() -> list[tuple[str, str]]:
    return [(f"{endpoint.method} {endpoint.path}", endpoint.path) for endpoint in ALL_ENDPOINTS]


if __name__ == "__main__":
    sys.exit(main())
