"""Steps in containers of a Docker engine; only this file, its housekeeping and its answers import docker.

Containers are created and started, never run, attached to, executed in or read from by the engine: the
output leaves through bind-mounted files, so that neither the runner's death nor the engine's loses it.
Each step joins the network of a holder that was prepared ahead and serves no other step.
"""

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import docker
import docker.errors
import docker.types
import requests
import structlog
from docker.utils import parse_repository_tag

from runner.credentials import RegistryLogin
from runner.errors import BadSetup, EngineUnavailable, ImageGone, RunnerError, StepError
from runner.executor import egress, epoch, holder_image, launcher, owner, seccomp, sight, trust, verdict
from runner.executor.answers import must_answer
from runner.executor.base import Bind, Created, Ended, Job, Leftover, name_of
from runner.executor.bustle import Bustle
from runner.executor.holders import HolderPool
from runner.executor.housekeeping import Housekeeping
from runner.executor.images import PulledImages
from runner.executor.logins import find_login
from runner.executor.pulls import PullFailed, Pulls
from runner.executor.secret_files import SecretFiles
from runner.spares import Spare
from shared.reasons import Reason
from shared.references import plain_image

CAPABILITIES: Final = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "SETUID", "SETGID", "KILL", "NET_BIND_SERVICE")
# Without a value the engine takes them out of the image's environment: they would make a shell run other
# commands than the step's, or none at all and still end with 0.
UNSET: Final = ("BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS")
NETWORKS: Final = frozenset({"bridge", "none"})
BRIDGE: Final = "buildmill0"
REQUEST_S: Final = 60
SLOW_S: Final = 180  # a start under load, a pull that says nothing
POLL_S: Final = 0.1
WAIT_PART_S: Final = 5.0
DEATH_S: Final = 60.0
LONGEST_KEPT_S: Final = 10.0
UNAIDED_S: Final = 10.0
DIAGNOSTICS_LIMIT: Final = 65536
CONNECTIONS: Final = 64
OWNER: Final = "buildmill.owner"
WALLS: Final = ("com.docker.network.bridge.name", "com.docker.network.bridge.enable_icc")
_NEVER: Final = "0001-01-01T00:00:00Z"
_MIB: Final = 1024 * 1024

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a step may use when it does not say."""

    cpus: float | None = None
    memory_mb: int | None = None
    pids: int = 4096
    shm_mb: int = 64


NO_TRUST: Final = trust.HostTrust(env={})
NO_LOGINS: Final[Mapping[str, RegistryLogin]] = {}


class DockerExecutor:
    """The executor over one engine. Any number of threads may call it."""

    name = "docker"
    isolates = True

    def __init__(
        self,
        *,
        runner: str,
        base_url: str | None,
        limits: Limits,
        host_trust: trust.HostTrust,
        refuse_private: bool | None,
        holders_ahead: Mapping[str, int],
        logins: Mapping[str, RegistryLogin],
        images: PulledImages,
        keep_images: Collection[str],
        secret_files: SecretFiles,
        former_ids: Collection[str] = (),
    ) -> None:
        self._runner = runner
        self._runners = frozenset({runner, *former_ids})
        self._secret_files = secret_files
        self._base_url = base_url
        self._limits = limits
        self._trust = host_trust
        self._refuse_private = refuse_private
        self._logins = logins
        self._profile = seccomp.make_profile()
        self._starts = threading.BoundedSemaphore(os.cpu_count() or 1)
        self._api = _connect(base_url)
        self._socket = _socket_of(self._api)
        self._slow_api = _connect(base_url, timeout=SLOW_S)
        self._images = images
        self._housekeeping = Housekeeping(self._api, runners=self._runners, images=images, keep=keep_images)
        self._bustle = Bustle()
        self._sweeper = ThreadPoolExecutor(max_workers=2, thread_name_prefix="sweep")
        self._pulls = Pulls(self._pull_once)
        self._asked: set[str] = set()
        self._opened = time.monotonic()
        self._began: dict[str, float] = {}
        self.notes: list[str] = list(host_trust.notes)
        self._has_holders = self._make_holder_image()
        self._network = self._make_network()
        self._apply_egress()
        self._sweep_holders()
        ahead = dict(holders_ahead) if self._has_holders else {}
        self._holders = HolderPool(
            self._make_holder,
            self._remove_container,
            ahead=ahead,
            until_quiet=self._bustle.until_quiet,
        )
        self._watch = epoch.EngineWatch(self._listen, came_back=self._engine_came_back)
        self._watch.wait_until_listening(5)

    # -- images

    def pull(self, image: str, *, deadline_s: float, progress: Callable[[str], None]) -> str:
        image = plain_image(image)
        found = self._find_image(image)
        if found is not None:
            self._images.note_used(image, found["Id"])
            return _digest_of(found)
        self._pulls.pull(image, deadline_s=deadline_s, progress=progress)
        found = self._find_image(image)
        if found is None:  # an engine that ends breaks a pull off as if it were complete
            raise EngineUnavailable(f"{image} is not here although its pull has ended")
        self._images.note_pulled(image, found["Id"])
        return _digest_of(found)

    def _find_image(self, image: str) -> dict[str, Any] | None:
        with must_answer():
            try:
                found: dict[str, Any] = self._api.inspect_image(image)
            except docker.errors.ImageNotFound:
                return None
            except docker.errors.APIError as error:
                raise StepError(verdict.explain_create(_text(error)), _text(error)) from error
        return found

    def _pull_once(self, image: str) -> Generator[str, None, None]:
        repository, tag = parse_repository_tag(image)
        with must_answer():
            try:
                for event in self._slow_api.pull(
                    repository,
                    tag=tag or "latest",
                    stream=True,
                    decode=True,
                    auth_config=find_login(repository, self._logins),
                ):
                    if "error" in event:
                        text = str(event["error"])[:2000]
                        if verdict.engine_gave_up(text):
                            raise EngineUnavailable(f"the engine broke off the pull of {image}: {text}")
                        raise PullFailed(text)
                    line = _progress_line(image, event)
                    if line:
                        yield line
            except docker.errors.APIError as error:
                raise PullFailed(_text(error)) from error
            except requests.exceptions.RequestException as error:
                if "timed out" in str(error).lower():
                    raise PullFailed(f"{image}: nothing arrived for {SLOW_S} s: timed out") from error
                raise

    # -- the life of an attempt

    def make_files(self, attempt_dir: Path) -> None:
        launcher.make_attempt_files(attempt_dir)

    def create(self, job: Job) -> Created:
        with self._bustle.working_on(job.name):
            launcher.make_attempt_files(job.attempt_dir)
            image = self._find_image(plain_image(job.image))
            if image is None:
                raise ImageGone(job.image)
            self._create_container(job, image["Id"])
        return Created(container=job.name, image_digest=_digest_of(image))

    def _create_container(self, job: Job, image_id: str) -> None:
        secrets = self._place_secrets(job)
        holder = self._take_holder(job)
        body = self._body(job, image_id, holder, secrets)
        with must_answer():
            try:
                self._api.create_container_from_config(body, name=job.name)
                return
            except docker.errors.APIError as error:
                if holder is not None:
                    self._remove_soon(holder)
                if error.status_code == 404 and verdict.lacks_image(_text(error)):
                    raise ImageGone(job.image) from error
                if error.status_code != 409:
                    raise StepError(verdict.explain_create(_text(error)), _text(error)) from error
        self._adopt(job)

    def _place_secrets(self, job: Job) -> Path | None:
        if not job.secrets:
            return None
        return self._secret_files.place(job.name, job.secrets, for_any_user=job.user != "root")

    def _adopt(self, job: Job) -> None:
        found = self._inspect(job.name)
        labels = found["Config"].get("Labels") or {} if found else {}
        if {key: labels.get(key) for key in _labels(job)} != _labels(job):
            raise StepError(
                Reason.DAEMON_ERROR, f"the name {job.name} belongs to a container that is not ours"
            )
        self._record_holder(job, _holder_of(found))

    def start(self, job: Job) -> None:
        for is_last in (False, True):
            found = self._inspect(job.name)
            if found is None:
                raise StepError(Reason.CONTAINER_VANISHED, f"{job.name} was removed before it started")
            if found["State"]["StartedAt"] != _NEVER:
                return  # a second start would run the script a second time
            self._note_engine(job)
            sight.note_container(job.attempt_dir, found["Id"])
            self._place_secrets(job)  # a restart of the machine has taken them
            try:
                with self._bustle.working_on(job.name):
                    self._start_container(job.name)
            except StepError as error:
                if is_last or verdict.find_remedy(error.detail) is verdict.Remedy.NOTHING:
                    raise
                _log.info("a network holder was gone", container=job.name)
                self._holders.forget_ready()
                self._remove_with_holder(job.name, found)
                self._create_container(job, found["Image"])
            else:
                return

    def has_started(self, job: Job) -> bool:
        found = self._inspect(job.name)
        return found is None or found["State"]["StartedAt"] != _NEVER

    def _start_container(self, name: str) -> None:
        with must_answer(), self._starts:
            try:
                self._slow_api.start(name)
            except docker.errors.APIError as error:
                raise StepError(verdict.explain_start(_text(error)), _text(error)) from error

    def wait(self, job: Job, *, timeout_s: float) -> Ended | None:
        until = time.monotonic() + timeout_s
        try:
            return self._wait(job, until)
        except EngineUnavailable:
            if sight.outlives(job.attempt_dir, max(0.0, until - time.monotonic())):
                return None  # it goes on without its engine
            if self._was_asked(job) and sight.has_died(job.attempt_dir):
                return Ended(launcher.read_rc(job.attempt_dir), None)
            raise

    def _wait(self, job: Job, until: float) -> Ended | None:
        while True:
            found = self._inspect(job.name)
            if found is None:
                return verdict.judge_vanished(launcher.read_rc(job.attempt_dir))
            state = found["State"]
            if job.secrets:
                self._secret_files.remove_read(job.name)
            if state["Status"] in ("exited", "dead"):
                self._bustle.note(job.name)
                return self._judge(job, state)
            left_s = until - time.monotonic()
            if state["Status"] == "created" and state.get("Error"):
                return Ended(None, None, reason=verdict.explain_start(state["Error"]), detail=state["Error"])
            if left_s <= 0:
                return None
            if state["Status"] == "created":
                time.sleep(min(POLL_S, left_s))  # the engine has no call that waits for a start
                continue
            sight.note_seen(job.attempt_dir, found["Id"], state["Pid"])
            if not _outlives(state["Pid"], found["Id"], left_s):
                self._await_engine(job.name, min(left_s, WAIT_PART_S))

    def _await_engine(self, name: str, timeout_s: float) -> None:
        """Wait until the engine itself counts the container as ended, or the time is over."""
        try:
            self._slow_api.wait(name, timeout=max(0.05, timeout_s), condition="not-running")
        except requests.exceptions.RequestException:
            time.sleep(0.02)  # the time is over or the engine is away; looking again tells which
        except docker.errors.APIError as error:
            if error.status_code != 404:
                time.sleep(POLL_S)

    def _judge(self, job: Job, state: Mapping[str, Any]) -> Ended:
        rc, code = launcher.read_rc(job.attempt_dir), int(state["ExitCode"])
        suspicious = code in verdict.SUSPICIOUS_CODES
        return verdict.judge(
            verdict.Facts(
                rc=rc,
                code=code,
                oom=bool(state.get("OOMKilled")),
                we_asked=self._was_asked(job),
                engine_broke=suspicious and self._engine_broke(job),
                launcher_said=self.diagnostics(job).decode("utf-8", "replace")
                if (rc, code) != (0, 0)
                else "",
            ),
        )

    def kill(self, job: Job, *, hard: bool) -> None:
        self._note_asked(job)
        try:
            self._kill(job, hard=hard)
        except EngineUnavailable:
            if hard and not sight.kill(job.attempt_dir, timeout_s=UNAIDED_S):
                raise
            if not hard and not sight.terminate(job.attempt_dir) and not sight.has_died(job.attempt_dir):
                raise

    def _kill(self, job: Job, *, hard: bool) -> None:
        if not hard:
            self._send(job.name, "SIGTERM")
            return
        until = time.monotonic() + DEATH_S
        while time.monotonic() < until:
            self._send(job.name, "SIGKILL")
            found = self._inspect(job.name)
            if found is None or not found["State"]["Running"]:
                self._kill_others(job)
                return
            self._await_engine(job.name, 1.0)
        raise EngineUnavailable(f"{job.name} does not die although it was killed for {DEATH_S:g} s")

    def _kill_others(self, job: Job) -> None:
        """What was begun for the attempt under a former name of this runner has to be dead as well."""
        labels = [f"buildmill.step={job.step_id}", f"buildmill.attempt={job.attempt}"]
        for found in self._list("step", *labels):
            if self._is_ours(found) and f"/{job.name}" not in found["Names"]:
                self._remove_container(found["Id"])

    def _send(self, name: str, signal: str) -> None:
        with must_answer():
            try:
                self._api.kill(name, signal)
            except docker.errors.APIError as error:
                if error.status_code not in (404, 409):  # gone, or not running
                    raise EngineUnavailable(f"{name} cannot be sent {signal}: {_text(error)}") from error

    def diagnostics(self, job: Job) -> bytes:
        with must_answer():
            try:
                text: bytes = self._api.logs(job.name, stdout=True, stderr=True, tail=500)
            except docker.errors.APIError as error:
                return f"the engine kept no log of the launcher: {_text(error)}\n".encode()
        return text[-DIAGNOSTICS_LIMIT:]

    def destroy(self, job: Job) -> None:
        self._secret_files.remove(job.name)
        with self._bustle.working_on(job.name):
            found = self._inspect(job.name)
            self._record_volumes(job, found)
            self._remove_with_holder(job.name, found)
        if _recorded(job, "holder") != (_holder_of(found) or ""):  # else it is being removed
            holder = self._own_holder(job)
            if holder:
                self._remove_soon(holder)
        self._asked.discard(job.name)
        self._began.pop(job.name, None)

    def remains(self, job: Job) -> list[str]:
        holder = self._own_holder(job)
        if holder:
            self._try_remove(holder)  # the sweeper may not have come to it
        labels = [f"buildmill.step={job.step_id}", f"buildmill.attempt={job.attempt}"]
        wanted = {"label": labels}
        with must_answer():
            try:
                containers = self._api.containers(all=True, filters=wanted)
                networks = self._api.networks(filters=wanted)
                volumes = self._api.volumes(filters=wanted).get("Volumes") or []
                known = [name for name in _recorded(job, "volumes").split() if self._has_volume(name)]
            except docker.errors.APIError as error:
                raise EngineUnavailable(_text(error)) from error
        networks, volumes = filter(self._is_ours, networks), filter(self._is_ours, volumes)
        found = [f"container {one['Id']}" for one in filter(self._is_ours, containers)]
        if holder and self._inspect(holder) is not None:
            found.append(f"container {holder}")
        found += [f"network {one['Name']}" for one in networks]
        found += [f"secrets of {job.name}"] if self._secret_files.stands(job.name) else []
        return found + [f"volume {name}" for name in {*known, *(one["Name"] for one in volumes)}]

    def _has_volume(self, name: str) -> bool:
        try:
            self._api.inspect_volume(name)
        except docker.errors.NotFound:
            return False
        return True

    def _record_volumes(self, job: Job, found: Mapping[str, Any] | None) -> None:
        """The volumes that the engine made for the image: without the container nothing else names them."""
        mounts = (found or {}).get("Mounts") or []
        names = [mount["Name"] for mount in mounts if mount.get("Type") == "volume"]
        if names and job.attempt_dir.is_dir():
            (job.attempt_dir / "volumes").write_text("\n".join(names), encoding="utf-8")

    def leftovers(self) -> list[Leftover]:
        return [
            Leftover(
                name=found["Names"][0].lstrip("/"),
                step_id=found["Labels"].get("buildmill.step", ""),
                attempt=int(found["Labels"].get("buildmill.attempt", "0")),
                is_running=found["State"] in ("running", "paused", "restarting"),
            )
            for found in self._list("step")
            if self._is_ours(found)
        ]

    def remove_leftover(self, leftover: Leftover) -> None:
        self._secret_files.remove(leftover.name)
        self._remove_with_holder(leftover.name, self._inspect(leftover.name))

    def remove_strays(self, held: Collection[tuple[str, int]]) -> None:
        self._secret_files.sweep([name_of(runner, *key) for key in held for runner in self._runners])
        self._housekeeping.remove_strays(held, self._holders.list_spared())

    def spares(self, wanted: Collection[str]) -> Iterator[Spare]:
        return self._housekeeping.spare_images({plain_image(image) for image in wanted})

    def storage(self) -> Path | None:
        return self._housekeeping.root()

    def close(self) -> None:
        self._bustle.end()
        self._watch.close()
        self._holders.close()
        self._sweeper.shutdown(wait=True)
        self._api.close()
        self._slow_api.close()

    # -- what a container looks like

    def _body(self, job: Job, image_id: str, holder: str | None, secrets: Path | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "Image": image_id,
            "Entrypoint": ["/bin/sh", f"{launcher.INSIDE}/launch.sh"],
            "Cmd": [],
            "WorkingDir": "/workspace",
            "Env": [*(f"{name}={value}" for name, value in self._env(job).items()), *UNSET],
            "Labels": _labels(job) | {"buildmill.image": job.image},
            "Tty": False,
            "OpenStdin": False,
            "AttachStdin": False,
            "AttachStdout": False,
            "AttachStderr": False,
            "Healthcheck": {"Test": ["NONE"]},
            "HostConfig": self._host_config(job, holder, secrets),
        }
        if job.user == "root":
            body["User"] = "0:0"
        return body

    def _env(self, job: Job) -> dict[str, str]:
        ours = {
            "TINI_KILL_PROCESS_GROUP": "1",
            "GIT_CONFIG_COUNT": "1",  # the checkout belongs to another user than the step's
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
        }
        return {**ours, **self._trust.env, **job.env}

    def _host_config(self, job: Job, holder: str | None, secrets: Path | None) -> dict[str, Any]:
        cpus = job.cpus if job.cpus is not None else self._limits.cpus
        memory_mb = job.memory_mb if job.memory_mb is not None else self._limits.memory_mb
        config: dict[str, Any] = {
            "Init": True,
            "RestartPolicy": {"Name": "no"},
            "NetworkMode": f"container:{holder}" if holder else self._network_mode(job.network),
            "LogConfig": {"Type": "local", "Config": {"max-size": "1m", "max-file": "2"}},
            "SecurityOpt": ["no-new-privileges", f"seccomp={self._profile}"],
            "CapDrop": ["ALL"],
            "CapAdd": list(CAPABILITIES),
            "IpcMode": "private",
            "OomScoreAdj": 500,  # when the machine itself runs short, steps go before the runner
            "PidsLimit": job.pids if job.pids is not None else self._limits.pids,
            "ShmSize": self._limits.shm_mb * _MIB,
            "Mounts": [_mount(bind) for bind in self._binds(job, secrets)],
        }
        if memory_mb is not None:
            config["Memory"] = config["MemorySwap"] = memory_mb * _MIB
        if cpus is not None:
            config["NanoCpus"] = int(cpus * 1e9)
        return config

    def _binds(self, job: Job, secrets: Path | None) -> list[Bind]:
        folder, inside = job.attempt_dir, launcher.INSIDE
        read_only = [
            Bind(folder / name, f"{inside}/{name}", read_only=True) for name in ("launch.sh", "script.sh")
        ]
        written = [Bind(folder / name, f"{inside}/{name}") for name in ("log", "rc", "pipe")]
        if secrets is not None:
            written.append(Bind(secrets, f"{inside}/secrets"))
        return [*read_only, *written, Bind(job.workspace, "/workspace"), *job.binds, *self._trust.binds]

    # -- networks

    def _network_mode(self, kind: str) -> str:
        if kind not in NETWORKS:
            raise StepError(Reason.BAD_CONFIG, f"network {kind!r} does not exist: say bridge or none")
        return self._network if kind == "bridge" else "none"

    def _take_holder(self, job: Job) -> str | None:
        self._network_mode(job.network)  # refuse what does not exist
        if not self._has_holders:
            return None
        holder = self._holders.take(job.network)
        self._record_holder(job, holder)
        return holder

    def _record_holder(self, job: Job, holder: str | None) -> None:
        """So that it can be removed even when the container of the step has gone."""
        (job.attempt_dir / "holder").write_text(holder or "", encoding="utf-8")

    def _make_holder(self, kind: str) -> str:
        body = {
            "Image": holder_image.NAME,
            "Entrypoint": [holder_image.PROGRAM],
            "Labels": {
                "buildmill.managed": "1",
                "buildmill.runner": self._runner,
                "buildmill.role": "holder",
                OWNER: owner.name_this_process(),
            },
            "HostConfig": {
                "NetworkMode": self._network_mode(kind),
                "LogConfig": {"Type": "none"},
                "SecurityOpt": ["no-new-privileges"],
                "CapDrop": ["ALL"],
                "ReadonlyRootfs": True,
                "PidsLimit": 64,  # what sets the container up counts too
            },
        }
        with must_answer():
            try:
                holder = str(self._api.create_container_from_config(body)["Id"])
            except docker.errors.APIError as error:
                raise EngineUnavailable(f"no network holder can be made: {_text(error)}") from error
        try:
            self._start_container(holder)
        except StepError as error:
            self._try_remove(holder)
            raise EngineUnavailable(f"no network holder can be started: {error.detail}") from error
        return holder

    def _make_holder_image(self) -> bool:
        if self._find_image(holder_image.NAME) is not None:
            return True
        with must_answer():
            tar = holder_image.make_image_tar(str(self._api.version().get("Arch")))
            if tar is None:
                self.notes.append(
                    "networks cannot be prepared ahead on this engine's processor; starts are slower"
                )
                return False
            repository, tag = holder_image.NAME.split(":")
            try:
                self._api.import_image_from_data(tar, repository=repository, tag=tag)
            except docker.errors.APIError as error:
                raise BadSetup(f"the engine takes no image of ours: {_text(error)}") from error
        return True

    def _make_network(self) -> str:
        """Our own bridge, on which containers cannot reach each other."""
        options = {
            "com.docker.network.bridge.name": BRIDGE,
            "com.docker.network.bridge.enable_icc": "false",
            "com.docker.network.driver.mtu": str(_outward_mtu()),
        }
        with must_answer():
            try:
                found = [n for n in self._api.networks(names=[BRIDGE]) if n["Name"] == BRIDGE]
                if not found:
                    labels = {"buildmill.managed": "1"}
                    self._api.create_network(BRIDGE, "bridge", options, labels=labels, check_duplicate=True)
                elif any((found[0].get("Options") or {}).get(name) != options[name] for name in WALLS):
                    raise BadSetup(
                        f"the network {BRIDGE} lets steps reach each other: docker network rm {BRIDGE}"
                    )
            except docker.errors.APIError as error:
                if error.status_code != 409:  # another runner of this machine was faster
                    raise BadSetup(f"the engine cannot make the network {BRIDGE}: {_text(error)}") from error
        return BRIDGE

    def _apply_egress(self) -> None:
        if self._refuse_private is None:
            return
        exceptions = [*self._trust.endpoints, *egress.find_resolvers()]
        note = egress.apply_rules(BRIDGE, refuse_private=self._refuse_private, exceptions=exceptions)
        if note is not None and note not in self.notes:
            self.notes.append(note)

    def _sweep_holders(self) -> None:
        """Remove the holders of our former life, and of other runners that died here, which no step uses."""
        modes = [step["HostConfig"]["NetworkMode"] for step in self._list("step")]
        used = {mode.removeprefix("container:") for mode in modes}
        for holder in self._list("holder"):
            labels = holder["Labels"]
            is_stale = self._is_ours(holder) or owner.is_dead(labels.get(OWNER, ""))
            if is_stale and holder["Id"] not in used:
                self._try_remove(holder["Id"])

    # -- the engine's life

    @contextmanager
    def _listen(self) -> Iterator[epoch.Stream]:
        with must_answer():
            try:
                api = _connect(self._base_url, timeout=None)
            except BadSetup as error:
                raise EngineUnavailable(str(error)) from error
            with contextlib.closing(api):
                try:
                    stream = api.events(decode=True, filters={"label": ["buildmill.role=engine-watch"]})
                except docker.errors.APIError as error:
                    raise EngineUnavailable(_text(error)) from error
                with contextlib.closing(stream):
                    yield stream

    def _engine_came_back(self) -> None:
        self._holders.forget_ready()
        self._apply_egress()  # a restarted engine or a flushed firewall may have dropped them

    def _note_engine(self, job: Job) -> None:
        self._began.setdefault(job.name, time.monotonic())
        engine = epoch.find_engine_process(self._socket)
        if engine is not None:
            (job.attempt_dir / "engine").write_text(engine, encoding="utf-8")

    def _engine_broke(self, job: Job) -> bool:
        if self._watch.has_broken_since(self._began.get(job.name, self._opened)):
            return True
        noted = job.attempt_dir / "engine"
        now = epoch.find_engine_process(self._socket)
        if noted.is_file() and noted.read_text(encoding="utf-8") != now:
            return True
        try:  # an engine that is shutting down serves old connections but takes no new ones
            _connect(self._base_url, timeout=5).close()
        except BadSetup:
            return True
        return False

    def _note_asked(self, job: Job) -> None:
        self._asked.add(job.name)
        with contextlib.suppress(FileNotFoundError):  # the folder may be gone when a stray is killed
            (job.attempt_dir / "asked").touch()  # for a runner that takes over before the end is seen

    def _was_asked(self, job: Job) -> bool:
        return job.name in self._asked or (job.attempt_dir / "asked").exists()

    # -- plain requests

    def _inspect(self, name: str) -> dict[str, Any] | None:
        with must_answer():
            try:
                found: dict[str, Any] = self._api.inspect_container(name)
            except docker.errors.NotFound:
                return None
            except docker.errors.APIError as error:
                raise EngineUnavailable(_text(error)) from error
        return found

    def _list(self, role: str, *wishes: str) -> list[dict[str, Any]]:
        """Containers of all runners, as far as they have these labels."""
        labels = ["buildmill.managed=1", f"buildmill.role={role}", *wishes]
        with must_answer():
            try:
                found: list[dict[str, Any]] = self._api.containers(all=True, filters={"label": labels})
            except docker.errors.APIError as error:
                raise EngineUnavailable(_text(error)) from error
        return found

    def _is_ours(self, found: Mapping[str, Any]) -> bool:
        """Made under our name or one we had before: a copied state folder names others' attempts."""
        return (found.get("Labels") or {}).get("buildmill.runner", self._runner) in self._runners

    def _own_holder(self, job: Job) -> str | None:
        """The recorded holder, if it still stands and is ours."""
        holder = _recorded(job, "holder")
        found = self._inspect(holder) if holder else None
        return holder if found is not None and self._is_ours(found["Config"]) else None

    def _remove_with_holder(self, name: str, found: Mapping[str, Any] | None) -> None:
        self._remove_container(name)
        holder = _holder_of(found)
        if holder:
            self._remove_soon(holder)

    def _remove_container(self, name: str) -> None:
        until = time.monotonic() + DEATH_S
        while True:
            with must_answer():
                try:
                    self._api.remove_container(name, v=True, force=True)
                    return
                except docker.errors.NotFound:
                    return
                except docker.errors.APIError as error:
                    if time.monotonic() > until:
                        raise EngineUnavailable(f"{name} cannot be removed: {_text(error)}") from error
            if self._inspect(name) is None:
                return
            time.sleep(POLL_S)  # someone else is removing it, or it is dying

    def _remove_soon(self, holder: str) -> None:
        """At a quieter moment, or in a few seconds: taking a network down costs as much as a step's start."""
        until = time.monotonic() + LONGEST_KEPT_S

        def remove() -> None:
            self._bustle.wait_for_quiet(until - time.monotonic())
            self._try_remove(holder)

        self._sweeper.submit(remove)

    def _try_remove(self, name: str) -> None:
        try:
            self._remove_container(name)
        except RunnerError as error:
            _log.warning("a container stays behind", container=name, error=str(error))


def open_docker(
    *,
    runner: str,
    state: Path,
    environ: Mapping[str, str],
    limits: Limits = Limits(),
    host_trust: bool = False,
    egress_rules: bool = True,
    refuse_private: bool = True,
    holders_ahead: int = 2,
    logins: Mapping[str, RegistryLogin] = NO_LOGINS,
    keep_images: Collection[str] = (),
    former_ids: Collection[str] = (),
) -> DockerExecutor:
    """Connect to the engine that DOCKER_HOST names, else to the local one; BadSetup says what to do."""
    return DockerExecutor(
        runner=runner,
        base_url=environ.get("DOCKER_HOST") or None,
        limits=limits,
        host_trust=trust.gather(environ, scratch=state / "trust") if host_trust else NO_TRUST,
        refuse_private=refuse_private if egress_rules else None,
        holders_ahead={"bridge": holders_ahead, "none": min(1, holders_ahead)},
        logins=logins,
        images=PulledImages(state / "images.json"),
        keep_images=keep_images,
        secret_files=SecretFiles(state, runner, former_ids),
        former_ids=former_ids,
    )


def _connect(base_url: str | None, *, timeout: float | None = REQUEST_S) -> Any:  # docker ships no types
    where = base_url or "unix:///var/run/docker.sock"
    try:
        if where.startswith("unix://"):
            _knock(where.removeprefix("unix://"))
        api = docker.APIClient(base_url=where, version="auto", timeout=timeout, max_pool_size=CONNECTIONS)
    except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as error:
        remedy = "start one (scripts/engine), name it in DOCKER_HOST, or say --executor process"
        raise BadSetup(f"no container engine answers at {where}: {error}; {remedy}") from error
    return api


def _knock(socket_path: str) -> None:
    """Fail at once where nobody listens; the client would leave an open socket behind."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(5)
        line.connect(socket_path)


def _socket_of(api: Any) -> str | None:
    socket_path = getattr(api.get_adapter(api.base_url), "socket_path", None)
    return None if socket_path is None else str(socket_path)


def _outlives(pid: int, container: str, timeout_s: float) -> bool:
    """Watch the container's first process, with which all others die; True when it lived all the time.

    The process is of this machine only when the engine is: its control group must name the container.
    """
    if pid <= 0:
        return False
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # it is dead, or this machine cannot see it
        return False
    try:
        if container not in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8"):
            return False
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return not poll.poll(int(timeout_s * 1000) + 1)
    except OSError:  # it died between two looks
        return False
    finally:
        os.close(descriptor)


def _labels(job: Job) -> dict[str, str]:
    return {
        "buildmill.managed": "1",
        "buildmill.role": "step",
        "buildmill.runner": job.runner,
        "buildmill.step": job.step_id,
        "buildmill.attempt": str(job.attempt),
        "buildmill.build": job.build_id,
    }


def _holder_of(found: Mapping[str, Any] | None) -> str | None:
    mode = str(found["HostConfig"]["NetworkMode"]) if found else ""
    return mode.removeprefix("container:") if mode.startswith("container:") else None


def _recorded(job: Job, name: str) -> str:
    """What `create` or `destroy` wrote down beside the attempt's files."""
    file = job.attempt_dir / name
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _mount(bind: Bind) -> dict[str, Any]:
    return {"Type": "bind", "Source": str(bind.source), "Target": bind.target, "ReadOnly": bind.read_only}


def _digest_of(image: Mapping[str, Any]) -> str:
    digests = image.get("RepoDigests") or []
    return str(digests[0] if digests else image["Id"])


def _progress_line(image: str, event: Mapping[str, Any]) -> str:
    status = str(event.get("status", "")).strip()
    if not status or status == "Waiting":
        return ""
    parts = [f"{image}:", str(event.get("id", "")), status, str(event.get("progress", ""))]
    return " ".join(part for part in parts if part)[:300]


def _text(error: Any) -> str:
    explanation = error.explanation
    if isinstance(explanation, bytes):
        explanation = explanation.decode("utf-8", "replace")
    return str(explanation or error)[:2000]


def _outward_mtu() -> int:
    """The packet size of the way out; a larger one inside containers makes some connections hang."""
    try:
        routes = Path("/proc/net/route").read_text(encoding="utf-8").splitlines()[1:]
        device = next(line.split()[0] for line in routes if line.split()[1] == "00000000")
        return int(Path(f"/sys/class/net/{device}/mtu").read_text(encoding="utf-8"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 1500
