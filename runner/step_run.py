"""The recipe of one step, from its claim to its acknowledged completion.

Each phase writes its journal before it has an effect, and each effect is harmless twice: a runner that
was killed anywhere starts the recipe again and goes on where it was.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from runner.artifacts import Collected, collect
from runner.attempt import Attempt
from runner.cache import OpenCache
from runner.cleaning import Cleaning
from runner.deadline import Deadline, Moment, Silence
from runner.delivery import LogDelivery
from runner.disk import DiskWatch
from runner.durable import NO_ROOM
from runner.errors import EngineUnavailable, ImageGone, LeaseLost, LogRewind, Refused, StepError, StillAlive
from runner.executor.base import Bind, Created, Ended, Job
from runner.executor.launcher import has_lost_output, open_log
from runner.insistence import LAST_WORDS_S, PATIENCE_S, GaveUp, TooLate, insist
from runner.journal import Journal, JournalPhase
from runner.log_stream import Level, LogStream
from runner.mask import Masker, needles_for, plan_masking
from runner.means import Means
from runner.workspace import open_to_everybody, refuse_hidden_inputs
from shared.clock import to_wire, utc_now
from shared.protocol import ArtifactEntry, Claim, Completion, InputFile, Phase, Source, Start
from shared.reasons import Reason

T = TypeVar("T")
log = structlog.get_logger()

UPLOADS_AT_ONCE = 4
LOOK_S = 0.5
KILL_S = 60.0
HEAR_S = 0.2
ENGINE_PATIENCE_S = 600.0
ENGINE_PAUSE_S = 1.0
MOST_REPAIRS = 20
MOST_TRIES = 20
TRY_AGAIN_S = 0.5
TRY_AGAIN_LONGEST_S = 60.0
SYNTAX_ERROR_CODE = 2
CANCELLED = "CANCELLED"  # how the coordinator shows a step that a cancel has ended
HEAD_BYTES = 1024 * 1024
LONGEST_DETAIL = 4000


class StepRun:
    """One attempt, in one thread."""

    def __init__(
        self,
        means: Means,
        journal: Journal,
        attempt: Attempt,
        *,
        completed: Callable[[], None] = lambda: None,
    ) -> None:
        self._means = means
        self._completed = completed
        self._journal = journal
        self._attempt = attempt
        self._claim = Claim.model_validate(journal.claim)
        self._folder = journal.folder
        self._commit = str(journal.data.get("commit", ""))
        self._caches: list[OpenCache] = []
        self._stream: LogStream | None = None
        self._delivery: LogDelivery | None = None
        self._log_is_whole = True
        self._masker = Masker([])
        self._lacks_secrets = bool(set(self._claim.secret_names) - attempt.secrets.keys())
        self._ended_as_cancelled = False
        self._cleaning = Cleaning(means, journal, attempt, self._claim)

    def run(self) -> None:
        """Work until the completion is acknowledged, the lease is lost, or this process ends."""
        try:
            if self._is_told():
                self._completed()  # cleaning up keeps nobody waiting
                self._cleaning.clean_up()
            else:
                self._close_log()
                self._cleaning.prove(free=self._completed)
        except GaveUp:
            log.info("attempt_left_for_later", step=self._claim.step_id, phase=str(self._journal.phase))
        finally:
            self._close_log()

    def _is_told(self) -> bool:
        """Work and tell the outcome; False when somebody waits for the proof that nothing is left of it.

        That is so when the attempt was cancelled or given up, now or in a former life.
        """
        if not self._journal.phase.is_before(JournalPhase.CLEANING):
            return False
        try:
            try:
                self._open_log()
            except (OSError, StepError) as error:
                self._fail_without_log(error)
                return False  # what a former life started may still run
            if self._journal.phase.is_before(JournalPhase.COMPLETING):
                said = _dump(self._masked(self._make_outcome()))
                until = Deadline.after(PATIENCE_S).record()
                self._advance_as_room_allows(JournalPhase.COMPLETING, completion=said, tell_until=until)
            self._complete_at_last()
            return not self._ended_as_cancelled
        except TooLate as error:
            said = self._journal.data.get("completion") or {}
            log.error("outcome_never_told", step=self._claim.step_id, outcome=said, cause=str(error))
            self._attempt.abandon()
            return False
        except LeaseLost as error:
            log.warning("attempt_given_up", step=self._claim.step_id, cause=str(error))
            self._attempt.abandon()
            return False

    def _close_log(self) -> None:
        """Harmless twice."""
        if self._delivery is not None:
            self._delivery.close()
        elif self._stream is not None:
            self._stream.close()
        self._delivery = self._stream = None

    # --- the outcome: everything up to what will be told --------------------------------------------

    def _make_outcome(self) -> Completion:
        try:
            ended = self._run_script()
            with self._means.blobs.gathering():
                return self._gather_outputs(ended)
        except StepError as error:
            self._note(f"{error.reason}: {error.detail}", "ERROR")
            self._discard_caches()
            return Completion(
                status="failed",
                reason=error.reason,
                detail=error.detail[:LONGEST_DETAIL],
                infra=error.reason.is_infrastructure,
                exit_code=self._journal.data.get("code"),
            )
        except (LeaseLost, GaveUp):
            raise
        except Exception as error:
            log.exception("step_run_failed", step=self._claim.step_id)
            self._note(f"internal: {type(error).__name__}: {error}", "ERROR")
            self._discard_caches()
            return Completion(
                status="failed", reason=Reason.INTERNAL, detail=str(error)[:LONGEST_DETAIL], infra=True
            )

    def _run_script(self) -> Ended:
        if not self._journal.phase.is_before(JournalPhase.EXITED):
            return _read_ended(self._journal.data["ended"])
        job = self._prepare()
        if self._journal.phase.is_before(JournalPhase.RUNNING):
            stopped = self._start_allowed(job)
            if stopped is not None:
                return stopped
        ended = self._watch(job)
        if self._delivery is not None:
            self._delivery.hurry()
        if ended.rc is None and ended.detail:
            self._note(ended.detail, "ERROR")
        if ended.reason is None and ended.rc == SYNTAX_ERROR_CODE and not self._has_begun():
            ended = replace(ended, reason=Reason.SYNTAX_ERROR)
        self._journal.advance(
            JournalPhase.EXITED,
            ended=_write_ended(ended),
            code=_exit_code(ended),
            dead=Moment.now().record(),
            lost_output=has_lost_output(self._folder),
        )
        return ended

    def _has_begun(self) -> bool:
        """False when the script's own start mark, with this attempt's nonce, is missing from the log.

        The beginning of a log that was cut can no longer be read; the script has then written a lot.
        """
        if self._delivery is not None and self._delivery.is_truncated:
            return True
        mark = f"##[buildmill:start {self._journal.data.get('nonce', '')} ".encode()
        descriptor = open_log(self._folder)
        try:
            return mark in os.pread(descriptor, HEAD_BYTES, 0)
        finally:
            os.close(descriptor)

    # --- before the script --------------------------------------------------------------------------

    def _prepare(self) -> Job:
        claim = self._claim
        if self._lacks_secrets and self._journal.phase.is_before(JournalPhase.RUNNING):
            raise StepError(Reason.INTERNAL, "the secrets of the step were not handed out again")
        is_fresh = self._journal.phase.is_before(JournalPhase.CREATING)
        digest = str(self._journal.data.get("image_digest", ""))
        if is_fresh:
            self._set_phase(Phase.PULLING)
            digest = self._pull(claim.image)
            self._stop_if_told()
        checkout = self._check_out(claim.source) if claim.source else None
        self._stop_if_told()
        self._set_phase(Phase.RESTORING)
        refuse_hidden_inputs(claim.inputs, [mount.path for mount in claim.mounts])
        self._open_caches()
        workspace = self._means.workspaces.build(
            self._folder,
            checkout=checkout,
            inputs=open_to_everybody(claim.inputs) if claim.user == "image" else claim.inputs,
            fetch=self._fetch,
            note=lambda line: self._note(line, "WARN"),
        )
        self._write_script()
        self._stop_if_told()
        if is_fresh:
            self._journal.advance(
                JournalPhase.CREATING,
                image_digest=digest,
                commit=self._commit,
                nonce=secrets.token_hex(8),
            )
        return self._job(workspace.path)

    def _pull(self, image: str) -> str:
        """Have the image; who goes on with a former life's pull has what that one left of its time."""
        deadline = Deadline.recorded(
            self._journal.data.get("pull_deadline"), otherwise_s=float(self._claim.limits.pull_timeout_s)
        )
        is_recorded = "pull_deadline" in self._journal.data

        def record() -> None:
            nonlocal is_recorded
            if not is_recorded:
                is_recorded = True
                self._journal.record(pull_deadline=deadline.record())

        def pull(progress: Callable[[str], None], _is_wanted: Callable[[], bool]) -> str:
            def tell(line: str) -> None:
                self._raise_if_told()  # nobody waits for the image any more, whatever the journal says by now
                progress(line)

            def ask() -> str:
                self._raise_if_told()
                left_s = max(0.0, deadline.left_s())
                return self._means.executor.pull(image, deadline_s=left_s, progress=tell)

            return self._with_engine(ask, patience_s=deadline.left_s())

        return self._hearing(pull, meanwhile=record)

    def _job(self, workspace: Path) -> Job:
        claim, limits = self._claim, self._claim.limits
        env = {**claim.env, "BUILDMILL_NONCE": str(self._journal.data.get("nonce", ""))}
        if self._commit:
            env["BUILDMILL_COMMIT"] = self._commit
        return Job(
            runner=self._means.runner_of(self._journal),
            step_id=claim.step_id,
            attempt=claim.attempt,
            build_id=claim.build_id,
            image=claim.image,
            attempt_dir=self._folder,
            workspace=workspace,
            binds=tuple(
                Bind(cache.path, _inside(mount.path))
                for cache, mount in zip(self._caches, claim.mounts, strict=True)
            ),
            env=env,
            secrets=self._attempt.secrets,
            network=claim.network,
            user=claim.user,
            cpus=limits.cpus,
            memory_mb=limits.memory_mb,
            pids=limits.pids,
        )

    def _check_out(self, source: Source) -> Path:
        self._set_phase(Phase.CHECKOUT)
        sources = self._means.sources
        if not self._commit:
            found = self._hearing(partial(sources.resolve, source))
            self._commit = insist(
                partial(
                    self._unless_told, lambda: self._means.client.bind_source(self._attempt.proof, found)
                ),
                given_up=self._attempt.abandoned,
                stopping=self._attempt.shutdown,
            )
            self._note(f"checking out {self._commit}")
        self._stop_if_told()
        self._journal.record(commit=self._commit)
        self._means.workspaces.pin(self._folder, {sources.name_of(source, self._commit)})
        return self._hearing(partial(sources.checkout, source, self._commit)).path

    def _open_caches(self) -> None:
        source, trust = self._claim.source, "other"
        if self._claim.mounts and source and self._commit:
            trust = self._journal.data.get("trust") or ("default" if self._is_trusted(source) else "other")
            self._journal.record(trust=trust)
        mounts = [mount.model_copy(update={"trust": trust}) for mount in self._claim.mounts]
        self._caches = [
            self._means.caches.open(self._folder, index, mount) for index, mount in enumerate(mounts)
        ]
        if self._journal.phase.is_before(JournalPhase.CREATING):
            for cache, mount in zip(self._caches, mounts, strict=True):
                state = "restored" if cache.is_warm else "empty"
                self._note(f"cache {mount.path}: {state} ({mount.trust} branch)")

    def _is_trusted(self, source: Source) -> bool:
        is_trusted = self._means.sources.is_trusted
        return self._hearing(lambda _, is_wanted: is_trusted(source, self._commit, is_wanted))

    def _write_script(self) -> None:
        path = self._folder / "script.sh"
        if path.exists():
            return
        temporary = self._folder / "script.sh.part"
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        with os.fdopen(descriptor, "wb") as file:
            file.write(self._claim.script.encode())
        temporary.chmod(0o444)
        temporary.rename(path)

    def _fetch(self, sha256: str) -> Path:
        """The local file of an input, downloaded when another runner has made it."""
        self._stop_if_told()
        blobs = self._means.blobs
        found = blobs.path(sha256)
        if found is None:
            size = self._size_of_input(sha256)

            def download() -> None:
                with blobs.writer(sha256, size) as writer:

                    def take(piece: bytes) -> None:
                        self._stop_if_told()
                        writer.write(piece)

                    self._means.client.get_blob(self._attempt.proof, sha256, take)

            try:
                insist(
                    partial(self._unless_told, download),
                    given_up=self._attempt.abandoned,
                    stopping=self._attempt.shutdown,
                )
            except Refused as error:
                if error.code != "blob_gone":
                    raise
                raise StepError(Reason.INTERNAL, f"an input is gone from the coordinator: {error}") from error
            found = blobs.path(sha256)
        if found is None:
            raise StepError(Reason.INTERNAL, f"the input {sha256} was removed right after it had arrived")
        return found

    def _size_of_input(self, sha256: str) -> int:
        wanted: list[InputFile] = [entry for entry in self._claim.inputs if entry.sha256 == sha256]
        return wanted[0].size

    # --- the script ---------------------------------------------------------------------------------

    def _start_allowed(self, job: Job) -> Ended | None:
        """Create, ask, start. An answer other than `go` ends the attempt before any of its script ran."""
        created = self._create(job)
        digest = str(self._journal.data.get("image_digest", "")) or created.image_digest
        said = Start(container=created.container, image_digest=digest[:512])
        answer = insist(
            partial(self._unless_told, lambda: self._means.client.start(self._attempt.proof, said)),
            given_up=self._attempt.abandoned,
            stopping=self._attempt.shutdown,
        )
        if answer.action == "cancel":
            self._attempt.cancel("cancelled")
        if self._attempt.cancelled.is_set():
            return Ended(rc=None, code=None, reason=Reason.CANCELLED)
        deadline = Deadline.after(float(answer.timeout_s))
        self._journal.advance(JournalPhase.RUNNING, deadline=deadline.record(), started_at=to_wire(utc_now()))
        return None

    def _create(self, job: Job) -> Created:
        """Another runner of this engine may have made room since the image was pulled: pull it once more."""
        try:
            return self._with_engine(lambda: self._means.executor.create(job))
        except ImageGone as error:
            self._note(f"{error.detail}: pulling it again", "WARN")
        self._journal.data.pop("pull_deadline", None)  # a pull of its own
        self._pull(self._claim.image)
        return self._with_engine(lambda: self._means.executor.create(job))

    def _watch(self, job: Job) -> Ended:
        """Start (or find) the script and wait for its end, an order, a time limit or too much silence."""
        executor, limits = self._means.executor, self._claim.limits
        self._set_phase(Phase.RUNNING)
        begun = self._journal.data.get("ending")
        if begun is not None:
            return self._end(job, Reason(begun["reason"]))  # a former life had sent TERM already
        deadline = Deadline.recorded(self._journal.data.get("deadline"), otherwise_s=float(limits.timeout_s))
        if self._attempt.must_stop and not self._with_engine(lambda: executor.has_started(job)):
            return Ended(rc=None, code=None, reason=self._ordered())
        try:
            self._with_engine(lambda: executor.start(job))
        except StepError as error:
            if error.reason is not Reason.CONTAINER_VANISHED:
                raise
        disk = DiskWatch(self._means.disk, self._folder)
        silence = self._open_silence()
        while True:
            ended = self._with_engine(lambda: executor.wait(job, timeout_s=LOOK_S))
            if ended is not None:
                return ended
            if self._attempt.must_stop:
                return self._end(job, self._ordered())
            if deadline.left_s() <= 0:
                self._note(f"the time limit of {limits.timeout_s} s is over", "ERROR")
                return self._end(job, Reason.TIMEOUT)
            if self._is_silent(silence):
                self._note(f"nothing was printed for {limits.no_output_s} s", "ERROR")
                return self._end(job, Reason.NO_OUTPUT)
            too_much = disk.verdict()
            if too_much:
                self._note(too_much, "ERROR")
                ended = self._end(job, Reason.DISK_LIMIT, grace_s=0.0)
                return replace(ended, detail=too_much)

    def _ordered(self) -> Reason:
        """Why the script has to end, when somebody said so."""
        if self._attempt.abandoned.is_set():
            raise LeaseLost("the coordinator said abandon")
        return Reason.CANCELLED if self._attempt.cancelled.is_set() else Reason.RUNNER_SHUTDOWN

    def _open_silence(self) -> Silence | None:
        limit_s = self._claim.limits.no_output_s
        if limit_s is None or self._stream is None:
            return None
        return Silence(float(limit_s), self._journal.data.get("silence"), size=self._stream.written)

    def _is_silent(self, silence: Silence | None) -> bool:
        assert self._stream is not None  # noqa: S101 - run opens it first
        size = self._stream.written
        if silence is None:
            return False
        news = silence.look(size)
        if news is not None:
            self._advance_as_room_allows(self._journal.phase, silence=news)
        return silence.is_too_long

    def _end(self, job: Job, reason: Reason, *, grace_s: float | None = None) -> Ended:
        """TERM, a grace, KILL; what the processes did last does not change why they had to end.

        Reason and moment of TERM are written down before it is sent: who takes over sends it once more and
        gives no second grace.
        """
        executor = self._means.executor
        begun = self._journal.data.get("ending")
        if begun is None:
            said = self._attempt.cancel_reason if reason is Reason.CANCELLED else ""
            self._note(f"stopping the step: {said or reason}", "WARN")
            seconds = float(self._claim.limits.grace_s) if grace_s is None else grace_s
            begun = {"reason": str(reason), "until": Deadline.after(seconds).record()}
            self._advance_as_room_allows(self._journal.phase, ending=begun, term=Moment.now().record())
        until = Deadline.recorded(begun["until"], otherwise_s=0.0)
        self._with_engine(lambda: executor.kill(job, hard=False))
        ended = self._await_death(job, until)
        if ended is None:
            self._with_engine(lambda: executor.kill(job, hard=True))
            ended = self._with_engine(lambda: executor.wait(job, timeout_s=KILL_S))
        return replace(ended or Ended(rc=None, code=None), reason=reason)

    def _await_death(self, job: Job, until: Deadline) -> Ended | None:
        """Give the grace, unless the coordinator gives up the attempt meanwhile."""
        while True:
            left_s = max(0.0, until.left_s())
            ended = self._with_engine(
                lambda: self._means.executor.wait(job, timeout_s=min(LOOK_S, left_s))  # noqa: B023 - asked at once
            )
            if ended is not None or left_s == 0.0:
                return ended
            if self._attempt.abandoned.is_set():
                raise LeaseLost("the coordinator said abandon")

    def _with_engine(self, ask: Callable[[], T], *, patience_s: float | None = None) -> T:
        """Ask again while the engine is away: a step goes on without it, and so does its run."""
        until = time.monotonic() + (ENGINE_PATIENCE_S if patience_s is None else patience_s)
        while True:
            try:
                return ask()
            except EngineUnavailable as error:
                if time.monotonic() > until and not self._is_seen_alive():
                    raise StepError(Reason.DAEMON_ERROR, str(error)) from error
                log.warning("engine_unavailable", step=self._claim.step_id, cause=str(error))
            if self._attempt.abandoned.wait(ENGINE_PAUSE_S):
                raise LeaseLost("the coordinator said abandon")

    def _is_seen_alive(self) -> bool:
        """Nothing is told of a step that is seen to run; before it is given up, what is seen of it is killed.

        What neither the engine nor this machine shows cannot be helped.
        """
        try:
            self._means.executor.kill(self._cleaning.job, hard=True)
        except StillAlive:
            return True
        except EngineUnavailable as error:
            log.warning("step_not_seen", step=self._claim.step_id, cause=str(error))
        return False

    # --- after the script ---------------------------------------------------------------------------

    def _gather_outputs(self, ended: Ended) -> Completion:
        code = _exit_code(ended)
        facts: dict[str, Any] = {
            "exit_code": code,
            "oom": ended.oom,
            "started_at": self._journal.data.get("started_at"),
            "finished_at": to_wire(utc_now()),
        }
        if not ended.succeeded:
            reason = ended.reason or Reason.EXIT_NONZERO
            self._note(_farewell(reason, code), "ERROR")
            self._discard_caches()
            return Completion(
                status="failed",
                reason=reason,
                detail=ended.detail[:LONGEST_DETAIL],
                infra=reason.is_infrastructure,
                **facts,
            )
        collected = self._collect()
        for warning in collected.warnings:
            self._note(warning, "WARN")
        if collected.missing:
            missing = ", ".join(collected.missing[:10])
            self._note(f"output_missing: {missing}", "ERROR")
            self._discard_caches()
            return Completion(
                status="failed",
                reason=Reason.OUTPUT_MISSING,
                detail=f"missing: {missing}"[:LONGEST_DETAIL],
                **facts,
            )
        self._upload(collected.entries)
        self._publish_caches()
        return Completion(status="success", artifacts=list(collected.entries), **facts)

    def _collect(self) -> Collected:
        if not self._claim.output_paths:
            return Collected((), (), ())
        self._set_phase(Phase.COLLECTING)
        limits = self._claim.limits
        if self._journal.phase.is_before(JournalPhase.COLLECTING):
            self._journal.advance(JournalPhase.COLLECTING)
        found = self._means.workspaces.find(self._folder)
        if found is None or not self._means.workspaces.is_standing(found):
            # An overlay does not survive a restart of the machine: the folder below it is there, and empty.
            raise StepError(Reason.INTERNAL, "the workspace has gone before its outputs were collected")
        return collect(
            found.path,
            self._claim.output_paths,
            max_files=limits.artifact_count,
            max_bytes=limits.artifact_bytes,
            store=self._store_output,
        )

    def _store_output(self, fd: int, *, max_bytes: int | None = None) -> tuple[str, int]:
        self._stop_if_cancelled()
        return self._means.blobs.put_fd(fd, max_bytes=max_bytes)

    def _upload(self, entries: tuple[ArtifactEntry, ...]) -> None:
        files = {entry.sha256: entry.size for entry in entries if entry.type == "file"}
        if not files:
            return
        self._set_phase(Phase.UPLOADING)
        if self._journal.phase.is_before(JournalPhase.UPLOADING):
            # The digests say which blobs have to be kept until the outputs are uploaded.
            self._journal.advance(JournalPhase.UPLOADING, collected=sorted(files))
        self._note(f"uploading {len(files)} outputs, {sum(files.values())} bytes")
        pool = ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="upload")
        try:
            for done in [pool.submit(self._upload_one, sha256, size) for sha256, size in files.items()]:
                while not wait([done], timeout=HEAR_S).done:
                    self._stop_if_cancelled()
                done.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # what is under way stops at its next piece

    def _upload_one(self, sha256: str, size: int) -> None:
        path = self._means.blobs.path(sha256)
        if path is None:
            raise StepError(Reason.INTERNAL, f"the output {sha256} has gone before it was uploaded")
        client, proof = self._means.client, self._attempt.proof

        def send() -> None:
            self._stop_if_cancelled()
            if not client.has_blob(proof, sha256):
                client.put_blob(proof, sha256, path, size, before_each=self._stop_if_cancelled)

        try:
            insist(send, given_up=self._attempt.abandoned, stopping=self._attempt.shutdown)
        except Refused as error:
            reason = Reason.DISK_LIMIT if error.status == 413 else Reason.UPLOAD_FAILED
            raise StepError(reason, str(error)) from error

    # --- telling ------------------------------------------------------------------------------------

    def _complete_at_last(self) -> None:
        """An outcome is told until it is heard: what nobody foresaw may be over a moment later."""
        for tried in range(1, MOST_TRIES + 1):
            try:
                self._complete()
                return
            except (LeaseLost, GaveUp):
                raise
            except Exception:
                log.exception("completion_failed", step=self._claim.step_id, tried=tried)
                if tried == MOST_TRIES:
                    raise
            if self._attempt.abandoned.wait(min(TRY_AGAIN_S * 2 ** (tried - 1), TRY_AGAIN_LONGEST_S)):
                raise LeaseLost("the coordinator said abandon")
            if self._attempt.shutdown.is_set():
                raise GaveUp("this process ends; the next one tells the outcome")

    def _complete(self) -> None:
        self._set_phase(Phase.COMPLETING)
        assert self._stream is not None  # noqa: S101 - run opens it first
        assert self._delivery is not None  # noqa: S101 - run opens it first
        self._deliver_log(self._delivery.finish)
        until = Deadline.recorded(self._journal.data.get("tell_until"), otherwise_s=PATIENCE_S)
        for _ in range(MOST_REPAIRS):
            said = self._with_log_facts(_undump(self._journal.data["completion"]))
            try:
                answer = insist(
                    partial(self._means.client.complete, self._attempt.proof, said),
                    given_up=self._attempt.abandoned,
                    stopping=self._attempt.shutdown,
                    patience_s=until.left_s(),
                    last_words_s=LAST_WORDS_S,
                )
            except LogRewind as order:
                self._deliver_log(partial(self._delivery.rewind, order.size))
            except Refused as error:
                self._tell_less(error)
            else:
                log.info("step_completed", step=self._claim.step_id, status=said.status)
                # The coordinator's word counts: a cancel that it did not know of yet comes too late.
                self._ended_as_cancelled = answer.step_status == CANCELLED or said.reason is Reason.CANCELLED
                self._advance_as_room_allows(
                    JournalPhase.CLEANING if self._ended_as_cancelled else JournalPhase.DONE
                )
                return
        raise LeaseLost("the coordinator never accepted the completion")

    def _deliver_log(self, deliver: Callable[[], None]) -> None:
        """A log that cannot be delivered does not keep the outcome: it is told without the log's facts."""
        if self._lacks_secrets:
            return
        try:
            deliver()
        except (LeaseLost, GaveUp):
            raise
        except Exception as error:
            log.exception("log_not_delivered", step=self._claim.step_id, cause=str(error))
            self._log_is_whole = False

    def _fail_without_log(self, error: OSError | StepError) -> None:
        """Where there is no room for a log nothing is run; the next attempt may be on another machine.

        What a former life started has printed more than was sent, for all anybody knows.
        """
        has_begun = not self._journal.phase.is_before(JournalPhase.RUNNING)
        is_full = not isinstance(error, OSError) or error.errno in NO_ROOM
        said = Completion(
            status="failed",
            reason=Reason.DISK_FULL if is_full else Reason.INTERNAL,
            detail=f"the log cannot be opened: {error}"[:LONGEST_DETAIL],
            infra=True,
            log_gap=has_begun or None,
        )
        log.error("log_not_opened", step=self._claim.step_id, cause=str(error))
        insist(
            partial(self._means.client.complete, self._attempt.proof, said),
            given_up=self._attempt.abandoned,
            stopping=self._attempt.shutdown,
        )
        self._advance_as_room_allows(JournalPhase.CLEANING, completion=_dump(said))

    def _with_log_facts(self, said: Completion) -> Completion:
        assert self._stream is not None and self._delivery is not None  # noqa: S101
        if self._delivery.is_truncated:
            return said
        if not self._log_is_whole or self._lacked_room_for_its_log(said):
            return said.model_copy(update={"log_gap": True})
        total = self._stream.total()
        facts = {"log_size": total.size, "log_sha256": total.sha256, "log_gap": self._stream.is_lost or None}
        return said.model_copy(update=facts)

    def _lacked_room_for_its_log(self, said: Completion) -> bool:
        """What a script prints onto a full disk is written nowhere; the coordinator says so in the log."""
        if self._journal.data.get("lost_output"):
            return True
        has_run = "started_at" in self._journal.data
        return has_run and said.reason is Reason.DISK_FULL and said.exit_code != 0

    def _tell_less(self, refused: Refused) -> None:
        """The coordinator will never take this completion: tell it the nearest that is legal."""
        log.error("completion_refused", step=self._claim.step_id, cause=str(refused))
        reason = Reason.UPLOAD_FAILED if refused.code == "outputs_incomplete" else Reason.INTERNAL
        self._advance_as_room_allows(
            self._journal.phase,
            completion=_dump(
                self._masked(
                    Completion(
                        status="failed", reason=reason, detail=str(refused)[:LONGEST_DETAIL], infra=True
                    )
                )
            ),
        )

    def _advance_as_room_allows(self, phase: JournalPhase, **data: Any) -> None:
        """Once the outcome is known it is told, even where a full disk keeps it from being written down.

        A runner that dies before it is told gathers it again, and what is told twice is told once.
        """
        try:
            self._journal.advance(phase, **data)
        except StepError as error:
            log.warning("journal_not_written", step=self._claim.step_id, cause=error.detail)

    # --- the log ------------------------------------------------------------------------------------

    def _open_log(self) -> None:
        self._means.executor.make_files(self._folder)
        warnings = self._prepare_masking()
        self._stream = LogStream(
            self._folder / "log", self._masker, checkpoints=self._folder / "checkpoints.json"
        )
        self._delivery = LogDelivery(self._means.client, self._attempt, self._stream)
        if self._lacks_secrets:
            # Not a byte of it is sent: nobody knows what would have to be masked.
            log.error("log_withheld", step=self._claim.step_id)
            self._log_is_whole = False
            return
        if self._journal.phase.is_before(JournalPhase.CREATING):
            for warning in warnings:
                self._note(warning, "WARN")
        self._delivery.start()

    def _prepare_masking(self) -> list[str]:
        """What is masked from here on; a warning for each secret that is too short for that."""
        of_the_step = {name: value.encode() for name, value in self._attempt.secrets.items()}
        needles, warnings = plan_masking(of_the_step)
        of_the_runner = {needle for secret in self._means.secrets for needle in needles_for(secret)}
        self._masker = Masker(sorted(of_the_runner.union(needles)))
        return warnings

    def _mask(self, text: str, *, cut_at: int | None = None) -> str:
        """Our own words may quote the step's; where they were cut, half a secret may stand at the end."""
        masker = self._masker.fresh()
        plain = text.encode("utf-8", "surrogatepass")
        masked = masker.feed(plain)
        if cut_at is None or len(text) < cut_at:
            masked += masker.finish()
        return text if masked == plain else masked.decode("utf-8", "replace")

    def _masked(self, said: Completion) -> Completion:
        detail = "" if self._lacks_secrets else self._mask(said.detail, cut_at=LONGEST_DETAIL)
        return said.model_copy(update={"detail": detail})

    def _note(self, line: str, level: Level = "INFO") -> None:
        if self._stream is None:
            return
        try:
            self._stream.note(self._mask(line), level)
        except StepError as error:
            # A full disk must not keep the outcome from being told; what needs the room says so itself.
            log.warning(
                "note_not_written", step=self._claim.step_id, line=self._mask(line)[:500], cause=error.detail
            )

    # --- the end ------------------------------------------------------------------------------------

    def _publish_caches(self) -> None:
        self._reopen_caches()
        for cache in self._caches:
            self._means.caches.publish(cache)
        self._caches = []

    def _discard_caches(self) -> None:
        self._reopen_caches()
        for cache in self._caches:
            self._means.caches.discard(cache)
        self._caches = []

    def _reopen_caches(self) -> None:
        """After a restart: the caches the former life had opened."""
        if not self._caches:
            found = [self._means.caches.find(self._folder, n) for n in range(len(self._claim.mounts))]
            self._caches = [cache for cache in found if cache is not None]

    # --- orders -------------------------------------------------------------------------------------

    def _set_phase(self, phase: Phase) -> None:
        self._attempt.phase = phase

    def _hearing(
        self,
        work: Callable[[Callable[[str], None], Callable[[], bool]], T],
        *,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> T:
        """Do what may take minutes, and hear meanwhile what we are told.

        Who is told to stop does not wait: the work is not wanted any more and ends by itself, at the latest
        by its own limits, and nobody hears of it.
        """
        done: Future[T] = Future()
        ears = threading.Lock()
        listening = True

        def progress(line: str) -> None:
            with ears:
                if listening:
                    self._note(line)

        def run() -> None:
            try:
                done.set_result(work(progress, lambda: listening))
            except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
                done.set_exception(error)

        threading.Thread(target=run, name=f"work-{self._claim.step_id[-8:]}", daemon=True).start()
        try:
            while not wait([done], timeout=HEAR_S).done:
                self._stop_if_told()
                meanwhile()
            return done.result()
        finally:
            with ears:
                listening = False

    def _unless_told(self, send: Callable[[], T]) -> T:
        self._stop_if_told()
        return send()

    def _stop_if_cancelled(self) -> None:
        """After the script: nobody wants its outputs any more."""
        if self._attempt.abandoned.is_set():
            raise LeaseLost("the coordinator said abandon")
        if self._attempt.cancelled.is_set():
            raise StepError(Reason.CANCELLED, "the build was cancelled before the outputs were uploaded")

    def _stop_if_told(self) -> None:
        """Between the phases before the script: hear what the coordinator and the operator say."""
        if self._attempt.abandoned.is_set():
            raise LeaseLost("the coordinator said abandon")
        if not self._journal.phase.is_before(JournalPhase.RUNNING):
            return  # adopted while it runs: it is ended with its grace, by the one who waits for it
        self._raise_if_told()

    def _raise_if_told(self) -> None:
        if self._attempt.abandoned.is_set():
            raise LeaseLost("the coordinator said abandon")
        if self._attempt.cancelled.is_set():
            raise StepError(Reason.CANCELLED, "the build was cancelled before the script ran")
        if self._attempt.shutdown.is_set():
            raise StepError(Reason.RUNNER_SHUTDOWN, "the runner was stopped before the script ran")


def _inside(path: str) -> str:
    return path if path.startswith("/") else f"/workspace/{path}"


def _exit_code(ended: Ended) -> int | None:
    """The script's own code where it is known, else the engine's."""
    code = ended.rc if ended.rc not in (None, 0) else ended.code
    if code is None:
        code = ended.rc
    return code if code is None or 0 <= code <= 255 else None


def _farewell(reason: Reason, code: int | None) -> str:
    return f"{reason}: {reason.meaning}" + (f" (exit code {code})" if code is not None else "")


def _write_ended(ended: Ended) -> dict[str, Any]:
    return {
        "rc": ended.rc,
        "code": ended.code,
        "oom": ended.oom,
        "reason": str(ended.reason) if ended.reason else None,
        "detail": ended.detail[:LONGEST_DETAIL],
    }


def _read_ended(said: dict[str, Any]) -> Ended:
    reason = Reason(said["reason"]) if said["reason"] else None
    return Ended(said["rc"], said["code"], said["oom"], reason, said["detail"])


def _dump(said: Completion) -> dict[str, Any]:
    return said.model_dump(mode="json", by_alias=True, exclude_none=True)


def _undump(said: dict[str, Any]) -> Completion:
    return Completion.model_validate(said, strict=False)
