"""The demo: a coordinator, two runners, and this very repository as the project they build."""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / ".demo"
BRANCH = "demo"
BASE_IMAGE = "buildmill/python:3"
DEMO_IMAGE = "buildmill/demo"
PYTHON = [sys.executable, "-m", "coordinator"]
READY_S = 60.0
STOP_S = 60.0

INSTALL = """\
# Sourced by the demo's steps: a fresh environment with "$@" in it, from the wheelhouse alone.
export PIP_CACHE_DIR="$PWD/.cache/pip" PIP_NO_INDEX=1 PIP_FIND_LINKS="$WHEELHOUSE"
export PIP_DISABLE_PIP_VERSION_CHECK=1
mkdir -p "$PIP_CACHE_DIR"
echo "pip cache: $(find "$PIP_CACHE_DIR" -type f | wc -l) files before"
place=$(mktemp -d)
python3 -m venv "$place"
. "$place/bin/activate"
pip install --progress-bar off "$@" > "$place/pip.log" || { cat "$place/pip.log"; exit 1; }
grep -E '^ *(Stored|Using cached|Successfully)' "$place/pip.log" || echo "pip had nothing to do"
"""


def say(line: str) -> None:
    print(f"demo: {line}", flush=True)


def main() -> int:
    wish = argparse.ArgumentParser(description=__doc__)
    wish.add_argument("--once", action="store_true", help="stop everything after the build")
    wish.add_argument("--executor", choices=["docker", "process"], default="docker")
    wish.add_argument("--port", type=int, default=3000, help="port of the coordinator (default 3000)")
    wish.add_argument("--runners", type=int, default=2, help="how many runners (default 2)")
    wish.add_argument("--revive", action="store_true", help="start again what was killed, and end")
    options = wish.parse_args()
    HERE.mkdir(exist_ok=True)
    state = runner_state()
    if options.revive:
        return Stage(options, state).revive()
    commit = prepare_repository(state / "repo.git")
    wheelhouse = prepare_wheelhouse(state / "wheelhouse")
    image = build_image(wheelhouse) if options.executor == "docker" else "buildmill/none:1"
    stage = Stage(options, state)
    try:
        stage.start()
        workflow_env = {} if options.executor == "docker" else {"WHEELHOUSE": str(wheelhouse)}
        build = order_build(stage.address, f"file://{state / 'repo.git'}", commit, image, workflow_env)
        succeeded = stage.watch(build)
        print_outcome(stage.address, build)
    finally:
        if options.once:
            stage.stop()
    if not options.once:
        say(f"the coordinator goes on at {stage.address} (try it: {stage.address}/docs)")
        say(f"stop all with: kill {' '.join(str(pid) for pid in stage.pids())}")
    return 0 if succeeded else 1


def runner_state() -> Path:
    """Where git, which a root runner starts as another user, can enter."""
    if os.geteuid() != 0:
        folder = HERE / "state"
    else:
        folder = Path("/var/lib/buildmill") / f"demo-{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}"
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    return folder


# --- what is built ----------------------------------------------------------------------------------


def git(*words: str, folder: Path = ROOT) -> str:
    argv = ["git", "-c", "safe.directory=*", "-C", str(folder), *words]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def prepare_repository(bare: Path) -> str:
    """A bare copy of this repository that the runner may read; returns the commit to build."""
    source = ROOT
    if not (ROOT / ".git").exists():
        say("there is no .git here: building a snapshot of the files as they are")
        source = snapshot()
    else:
        if git("rev-parse", "--is-shallow-repository") == "true":
            say("this is a shallow clone: only the commits that are here go into the demo's repository")
        if ROOT.stat().st_uid != os.geteuid():
            say("this folder belongs to another user: git is told to trust it for the demo only")
        changed = len(git("status", "--porcelain").splitlines())
        if changed:
            say(f"{changed} uncommitted changes are here and not in HEAD, which is what the demo builds")
    if not bare.exists():
        subprocess.run(["git", "init", "--quiet", "--bare", str(bare)], check=True)
        git("config", "receive.shallowUpdate", "true", folder=bare)
        git("symbolic-ref", "HEAD", f"refs/heads/{BRANCH}", folder=bare)
    git("push", "--quiet", "--force", str(bare), f"HEAD:refs/heads/{BRANCH}", folder=source)
    for path in [bare, *bare.rglob("*")]:
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
    return git("rev-parse", "HEAD", folder=source)


def snapshot() -> Path:
    folder = HERE / "snapshot"
    shutil.rmtree(folder, ignore_errors=True)
    unwanted = shutil.ignore_patterns(".demo", ".venv", ".wheelhouse", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=unwanted, symlinks=True)
    git("init", "--quiet", folder=folder)
    git("add", "--all", folder=folder)
    who = ("-c", "user.name=demo", "-c", "user.email=demo@localhost")
    git(*who, "commit", "--quiet", "--message", "A snapshot of the files", folder=folder)
    return folder


def prepare_wheelhouse(folder: Path) -> Path:
    """The wheelhouse of setup, with one source package in it, so that pip has something to cache."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / ".wheelhouse", folder)
    source = HERE / "source"
    if not list(source.glob("annotated_types-*.tar.gz")):
        argv = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        argv += ["--no-binary", "annotated-types", "--dest", str(source), "annotated-types"]
        if subprocess.run(argv, check=False, capture_output=True).returncode != 0:
            say("the package index cannot be reached: pip's cache will stay empty, all else is the same")
    for archive in source.glob("annotated_types-*.tar.gz"):
        for wheel in folder.glob("annotated_types-*.whl"):
            wheel.unlink()
        shutil.copy(archive, folder)
    (folder / "install.sh").write_text(INSTALL)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def build_image(wheelhouse: Path) -> str:
    """The base image with the wheelhouse in it, made once per content."""
    import docker
    import docker.errors

    digest = hashlib.sha256()
    for path in sorted(wheelhouse.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    digest.update(INSTALL.encode())
    client = docker.from_env()
    base = client.images.get(BASE_IMAGE)
    digest.update(base.id.encode())
    name = f"{DEMO_IMAGE}:{digest.hexdigest()[:12]}"
    with contextlib.suppress(docker.errors.ImageNotFound):
        client.images.get(name)
        return name
    say(f"making the image {name} with the wheelhouse in it")
    dockerfile = f"FROM {BASE_IMAGE}\nENV WHEELHOUSE=/wheelhouse\nCOPY wheelhouse /wheelhouse\n"
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        header = tarfile.TarInfo("Dockerfile")
        header.size = len(dockerfile.encode())
        archive.addfile(header, io.BytesIO(dockerfile.encode()))
        archive.add(wheelhouse, "wheelhouse")
    packed.seek(0)
    client.images.build(fileobj=packed, custom_context=True, tag=name, rm=True)
    return name


# --- who builds it ----------------------------------------------------------------------------------


class Stage:
    """The processes of the demo: a coordinator and its runners, each known by its own id."""

    def __init__(self, options: argparse.Namespace, state: Path) -> None:
        self._options = options
        self._state = state
        self._record = HERE / "processes.json"
        self._processes: dict[str, int] = {}
        self.address = ""

    def start(self) -> None:
        self._adopt_former()
        if not self.address:
            self._start_coordinator(self._free_port())
        for number in range(1, self._options.runners + 1):
            if f"runner {number}" not in self._processes:
                self._start_runner(number)
        for name, pid in self._processes.items():
            say(f"{name}: process {pid}, log {self._log(name)}")
        say("kill -9 any of them if you like; ./scripts/demo --revive starts it again and the build goes on")

    def revive(self) -> int:
        """Start those processes of a running demo again that have died, at the same address."""
        try:
            said = json.loads(self._record.read_text())
        except FileNotFoundError:
            sys.exit("demo: no demo is running here")
        self.address, self._options.executor = said["address"], said["executor"]
        self._processes = {name: pid for name, pid in said["processes"].items() if is_ours(pid)}
        for name in said["processes"]:
            if name in self._processes:
                continue
            if name == "coordinator":
                self._start_coordinator(int(self.address.rpartition(":")[2]))
            else:
                self._start_runner(int(name.rpartition(" ")[2]))
            say(f"{name}: process {self._processes[name]}")
        return 0

    def pids(self) -> list[int]:
        """Of all that run now, those that were started again meanwhile among them."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._processes = json.loads(self._record.read_text())["processes"]
        return [pid for pid in self._processes.values() if is_ours(pid)]

    def watch(self, build: str) -> bool:
        argv = [*PYTHON, "watch", build, "--coordinator", self.address]
        return subprocess.run(argv, check=False, cwd=ROOT).returncode == 0

    def stop(self) -> None:
        """Runners first, so that they can say how their steps ended."""
        self.pids()
        for name in sorted(self._processes, reverse=True):
            stop_process(self._processes[name])
        self._record.unlink(missing_ok=True)

    def _adopt_former(self) -> None:
        """What an earlier demo left running is used again."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            said = json.loads(self._record.read_text())
            alive = {name: pid for name, pid in said["processes"].items() if is_ours(pid)}
            if (
                "coordinator" in alive
                and said["executor"] == self._options.executor
                and answers(said["address"])
            ):
                self.address, self._processes = said["address"], alive
                return
            for pid in alive.values():
                stop_process(pid)

    def _free_port(self) -> int:
        port = self._options.port if is_free(self._options.port) else free_port()
        if port != self._options.port:
            say(f"port {self._options.port} is taken; using {port}")
        return port

    def _start_coordinator(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self._spawn("coordinator", ["coordinator", "--data", str(HERE / "data"), "--port", str(port)])
        deadline = time.monotonic() + READY_S
        while not answers(self.address):
            if time.monotonic() > deadline or not is_ours(self._processes["coordinator"]):
                sys.exit(f"demo: the coordinator does not start; see {self._log('coordinator')}")
            time.sleep(0.1)

    def _start_runner(self, number: int) -> None:
        argv = ["runner", "--coordinator", self.address, "--slots", "2", "--name", f"demo-{number}"]
        argv += ["--state", str(self._state / f"runner-{number}"), "--executor", self._options.executor]
        argv += ["--token-file", str(HERE / "data" / "keys" / "registration-token"), "--host-trust"]
        self._spawn(f"runner {number}", argv)

    def _spawn(self, name: str, words: list[str]) -> None:
        environ = {**os.environ, "BUILDMILL_GIT_PROTOCOLS": "https,ssh,file"}
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                [*PYTHON, *words],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._processes[name] = process.pid
        said = {"address": self.address, "executor": self._options.executor, "processes": self._processes}
        self._record.write_text(json.dumps(said))

    def _log(self, name: str) -> Path:
        return HERE / f"{name.replace(' ', '-')}.log"


def is_ours(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"coordinator" in Path(f"/proc/{pid}/cmdline").read_bytes() and not is_zombie(pid)
    return False


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def stop_process(pid: int) -> None:
    """TERM, and KILL when it has not ended in time."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while is_ours(pid) and time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.1)
        if is_ours(pid):
            os.kill(pid, signal.SIGKILL)


def answers(address: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{address}/readyz", timeout=2.0, trust_env=False).status_code == 200
    return False


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- what is asked of the REST API ------------------------------------------------------------------


def order_build(address: str, repository: str, commit: str, image: str, env: dict[str, str]) -> str:
    """Register what the build needs and ask for it; returns the build's id."""
    with httpx.Client(base_url=address, timeout=30.0, trust_env=False) as api:
        slug = f"demo-{image.rpartition(':')[2]}"
        answer = api.post("/api/docker-images", json={"slug": slug, "imageUrl": image})
        if answer.status_code not in (201, 409):
            checked(answer)
        project = find_project(api)
        settings = {"repoUrl": repository, "defaultBranch": BRANCH}
        checked(api.patch(f"/api/projects/{project}", json=settings))
        workflow = put_workflow(api, project, slug, env)
        wish = {"workflowId": workflow, "branch": BRANCH, "commitHash": commit}
        wish["commitMessage"] = git(
            "log", "-1", "--format=%s", folder=Path(repository.removeprefix("file://"))
        )
        build = checked(api.post(f"/api/projects/{project}/builds", json=wish))
    say(f"build {build['number']} of commit {commit[:12]}: {address}/api/builds/{build['id']}")
    return str(build["id"])


def find_project(api: httpx.Client) -> str:
    for project in checked(api.get("/api/projects", params={"accountId": "demo"})):
        if project["name"] == "buildmill":
            return str(project["id"])
    return str(checked(api.post("/api/projects", json={"accountId": "demo", "name": "buildmill"}))["id"])


def put_workflow(api: httpx.Client, project: str, slug: str, env: dict[str, str]) -> str:
    workflow = json.loads((ROOT / "scripts" / "demo-workflow.json").read_text())
    for step in workflow["steps"]:
        step["imageSlug"] = slug
        step["env"] = env
    for found in checked(api.get(f"/api/projects/{project}/workflows")):
        if found["name"] == workflow["name"]:
            return str(
                checked(api.put(f"/api/projects/{project}/workflows/{found['id']}", json=workflow))["id"]
            )
    return str(checked(api.post(f"/api/projects/{project}/workflows", json=workflow))["id"])


def checked(answer: httpx.Response) -> Any:
    if not answer.is_success:
        sys.exit(
            f"demo: {answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}"
        )
    return answer.json()


def print_outcome(address: str, build_id: str) -> None:
    with httpx.Client(base_url=address, timeout=30.0, trust_env=False) as api:
        build = checked(api.get(f"/api/builds/{build_id}"))
        for artifact in checked(api.get(f"/api/builds/{build_id}/artifacts")):
            where = f"{address}/api/artifacts/{artifact['id']}"
            what = f"{artifact['size']} bytes, sha256 {artifact['sha256'][:12]}"
            say(f"artifact {artifact['path']}: {what}, {where}")
        for step in build["steps"]:
            log = api.get(f"/api/steps/{step['id']}/log").text
            caches = [line.removeprefix("[buildmill] ") for line in log.splitlines() if "] cache " in line]
            for line in caches:
                say(f"{step['name']}: {line}")


if __name__ == "__main__":
    sys.exit(main())
