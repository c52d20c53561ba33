"""What every fault stands on: the coordinator, a project and runners of its own, and the time left."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx

from coordinator.cli.drill.bare_runner import BareRunner
from coordinator.cli.drill.checker import Wanted, check_build
from coordinator.cli.drill.engine import Engine
from coordinator.cli.drill.errors import DrillError, NotSeen, Refused
from coordinator.cli.drill.history import History
from coordinator.cli.drill.own_runner import OwnRunner
from coordinator.cli.drill.result import Finding, Kind
from coordinator.cli.drill.user_api import FINAL, UserApi
from shared.protocol import Timings

T = TypeVar("T")

LOOK_S = 0.1
CLEAN_S = 10.0
ENDED_S = 25.0


@dataclass(frozen=True)
class Wish:
    """What the operator asked for."""

    address: str
    token: str
    token_file: Path | None
    executor: str
    image: str
    steps: int
    keep: bool


@dataclass
class Stage:
    """One drill from its project to the removal of all it made."""

    wish: Wish
    drill: str
    api: UserApi
    folder: Path
    ends_at: float
    say: Callable[[str], None]
    engine: Engine | None
    project_id: str = ""
    timings: Timings = field(default_factory=Timings)
    amnesty_until: float = 0.0
    _image_id: str = ""
    _workflows: list[str] = field(default_factory=list)
    _builds: list[str] = field(default_factory=list)
    _runners: dict[str, OwnRunner] = field(default_factory=dict)
    _bare: BareRunner | None = None

    # --- time

    @property
    def left_s(self) -> float:
        """How long the drill may still take."""
        return self.ends_at - time.monotonic()

    def until(self, look: Callable[[], T], timeout_s: float, what: str) -> T:
        """Look until there is something to be seen; NotSeen when the time is over."""
        deadline = time.monotonic() + min(timeout_s, max(1.0, self.left_s))
        while True:
            seen = look()
            if seen:
                return seen
            if time.monotonic() > deadline:
                raise NotSeen(f"{what}: not seen within {timeout_s:g} s")
            self.say(what)
            time.sleep(LOOK_S)

    # --- builds

    def prepare(self) -> None:
        """The project and the image under the drill's own names."""
        made = self.api.create("/api/projects", {"accountId": self.drill, "name": self.drill})
        self.project_id = made["id"]
        # its project may be of another tenant than the operator's images are
        image = {"slug": self.drill, "imageUrl": self.wish.image, "public": True}
        self._image_id = self.api.create("/api/docker-images", image)["id"]

    def submit(self, steps: list[dict[str, Any]]) -> str:
        """A fresh workflow and a build of it; the id of the build."""
        path = f"/api/projects/{self.project_id}"
        workflow = self.api.create(f"{path}/workflows", {"name": self.drill, "steps": steps})
        self._workflows.append(workflow["id"])
        build: str = self.api.create(f"{path}/builds", {"workflowId": workflow["id"]})["id"]
        self._builds.append(build)
        return build

    def step(self, build_id: str, name: str) -> dict[str, Any]:
        for step in self.api.build(build_id)["steps"]:
            if step["name"] == name:
                found: dict[str, Any] = step
                return found
        raise Refused(f"build {build_id} has no step {name}")

    def await_lines(self, build_id: str, names: list[str], timeout_s: float) -> dict[str, int]:
        """Wait until each of these steps has printed a numbered line; how long their logs are then."""

        def printed() -> dict[str, int]:
            steps = {step["name"]: step for step in self.api.build(build_id)["steps"]}
            for name in names:
                if steps[name]["status"] in ("FAILED", "CANCELLED", "SKIPPED"):
                    raise NotSeen(f"step {name} is {steps[name]['status']}: {steps[name].get('reason')}")
            mark = f"\ndrill:{self.drill}:".encode()
            if all(mark in self.api.log(steps[name]["id"]) for name in names):
                return {name: steps[name]["logSize"] for name in names}
            return {}

        return self.until(printed, timeout_s, f"waiting for the first lines of {', '.join(names)}")

    def await_end(self, build_id: str, timeout_s: float) -> str:
        def ended() -> str:
            status: str = self.api.build(build_id)["status"]
            return status if status in FINAL else ""

        return self.until(ended, timeout_s, "waiting for the end of the build")

    def look_back(self, build_id: str, wanted: Mapping[str, Wanted]) -> tuple[History, list[Finding]]:
        """The build as it can be read back, and all that is wrong with it."""
        history = self.api.history(self.project_id, build_id)
        return history, check_build(history, wanted, self.drill)

    # --- runners

    def a_runner(
        self,
        name: str = "one",
        *,
        slots: int = 4,
        state: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> OwnRunner:
        """The runner of this name, not started; the same name is the same runner."""
        if name not in self._runners:
            self._runners[name] = OwnRunner(
                f"{self.drill}-{name}",
                state or self.folder / name,
                label=self.drill,
                executor=self.wish.executor,
                slots=slots,
                token_file=self.wish.token_file,
                env=env or {},
            )
        return self._runners[name]

    def bare_runner(self) -> BareRunner:
        """The drill's own client of the runner protocol."""
        if self._bare is None:
            name = f"{self.drill}-bare"
            self._bare = BareRunner(self.wish.address, self.wish.token, name=name, label=self.drill)
        return self._bare

    def end_runner(self, runner: OwnRunner) -> list[Finding]:
        """Stop it and look whether its machine is clean."""
        self.say("stopping the drill's runner and looking what is left")
        findings = []
        if not runner.end(self.wish.address, within_s=self.left_s):
            findings.append(Finding(Kind.WRONG, f"runner {runner.name} did not end when told to"))
        deadline = time.monotonic() + CLEAN_S
        while left := self.leftovers(runner):
            if time.monotonic() > deadline:
                findings += [Finding(Kind.LEFTOVER, what) for what in left[:10]]
                break
            time.sleep(LOOK_S)
        return findings

    def leftovers(self, runner: OwnRunner) -> list[str]:
        """What is left on this machine of steps that this runner ran."""
        left = [f"process {pid}: {what}" for pid, what in processes_of(runner.state)]
        left += [f"mount {place}" for place in mounts_below(runner.state)]
        left += [f"folder {place}" for place in sorted((runner.state / "a").glob("*/*"))]
        runner_id = self.api.runner_id(runner.name)
        if self.engine is not None and runner_id:
            left += self.engine.found_of(runner_id)
        return left

    # --- the end

    def cancel_builds(self) -> None:
        """End whatever still runs, so that the next fault finds nothing of this one."""
        for build_id in self._builds:
            self.api.cancel(build_id)
        self._builds.clear()

    def start_over(self) -> list[Finding]:
        """End all builds and runners; what is then left of them is told."""
        self.cancel_builds()
        findings = []
        for runner in self._runners.values():
            findings += self.end_runner(runner)
        return findings

    def close(self) -> list[str]:
        """Remove all that the drill made; says what could not be removed."""
        problems: list[str] = []
        for what, undo in (
            ("the builds", self.cancel_builds),
            ("the drill's client", self._close_bare),
            ("the runners", self._end_runners),
            ("what the engine has of them", self._clear_engine),
            ("the project", self._delete_project),
            ("the folder", self._remove_folder),
        ):
            try:
                undo()
            except (DrillError, OSError, subprocess.SubprocessError, httpx.HTTPError) as error:
                problems.append(f"{what} could not be removed: {error}")
        self.api.close()
        if self.engine is not None:
            self.engine.close()
        return problems

    def _close_bare(self) -> None:
        if self._bare is not None:
            self._bare.close()

    def _end_runners(self) -> None:
        deadline = time.monotonic() + ENDED_S
        for runner in self._runners.values():
            runner.end(self.wish.address, within_s=deadline - time.monotonic())
        left = [pid for runner in self._runners.values() for pid, _ in processes_of(runner.state)]
        if left:
            raise NotSeen(f"processes of steps do not end: {left}")

    def _clear_engine(self) -> None:
        for runner in self._runners.values():
            runner_id = self.api.runner_id(runner.name)
            if self.engine is not None and runner_id:
                self.engine.remove_all_of(runner_id)

    def _delete_project(self) -> None:
        if self.wish.keep or not self.project_id:
            return
        path = f"/api/projects/{self.project_id}"
        deadline = time.monotonic() + ENDED_S
        while any(build["status"] not in FINAL for build in self._listed_builds()):
            if time.monotonic() > deadline:
                raise NotSeen(f"builds of {self.drill} do not end")
            time.sleep(LOOK_S)
        for workflow_id in self._workflows:
            self.api.delete(f"{path}/workflows/{workflow_id}")
        self.api.delete(path)
        if self._image_id:
            self.api.delete(f"/api/docker-images/{self._image_id}")

    def _listed_builds(self) -> list[dict[str, Any]]:
        page = self.api.ask("GET", f"/api/projects/{self.project_id}/builds?limit=100").json()
        found: list[dict[str, Any]] = page["builds"]
        return found

    def _remove_folder(self) -> None:
        for place in mounts_below(self.folder):
            subprocess.run(["umount", "--lazy", place], check=False, timeout=CLEAN_S, capture_output=True)
        shutil.rmtree(self.folder)


def make_folder() -> Path:
    """A folder that every user can enter, as git runs as another one."""
    folder = Path(tempfile.mkdtemp(prefix="buildmill-drill-")).resolve()
    folder.chmod(0o755)
    return folder


def processes_of(state: Path) -> list[tuple[int, str]]:
    """Processes of steps without a container: they carry a folder below this one in their environment."""
    mark = f"={state}/a/".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # gone, or another user's
            if mark in (entry / "environ").read_bytes():
                said = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found.append((int(entry.name), said.decode(errors="replace")[:100]))
    return found


def mounts_below(folder: Path) -> list[str]:
    """Mount points below the folder, the innermost first."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    places = [line.split()[4] for line in lines]
    return sorted((place for place in places if place.startswith(f"{folder}/")), reverse=True)
