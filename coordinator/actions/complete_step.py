"""Record how a step ended and let its build move on."""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.append_log import GAP, end_with_gap, store_log
from coordinator.actions.end_unheard import UNENDED, close_log_before
from coordinator.actions.leased_step import LeaseProof, get_attempt, hold_attempt
from coordinator.actions.revive_step import revive_step
from coordinator.actions.settle_build import settle_build
from coordinator.actions.show_build import get_visible_build, get_visible_step
from coordinator.errors import (
    Invalid,
    Leased,
    LogIncomplete,
    NotFound,
    NotRunnable,
    OutputsIncomplete,
    StaleAttempt,
)
from coordinator.rules.access import Audience, Caller
from coordinator.rules.limits import event_of_stop
from coordinator.rules.retries import Retry, next_retry
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import artifacts, attempts, audit, builds, steps
from shared.faults import Fault
from shared.ids import new_id
from shared.protocol import Action, ArtifactEntry, Completion
from shared.reasons import Reason
from shared.references import InvalidReference, refuse_unshowable
from shared.states import BuildState, StepState
from shared.step_paths import is_pattern, output_pattern

MAX_BARE_PATHS = 1000
MAX_NAME_BYTES = 255


@dataclass(frozen=True)
class SealedLog:
    """The log as it was found on the disk right before: so many bytes with this digest."""

    size: int
    sha256: str


EMPTY_LOG = SealedLog(0, hashlib.sha256().hexdigest())


@dataclass(frozen=True)
class Verdict:
    """What the completion changed: how the step stands now and whether its build is over."""

    is_same: bool
    state: StepState
    is_build_complete: bool


def log_to_seal(tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof) -> tuple[int, Any]:
    """How long the attempt's log is and where it lies, for sealing it before the completion."""
    step = get_attempt(tx, site, caller, step_id, proof)
    return step.log_size, site.logs.path(step.build_id, step.id, step.attempt)


def complete_step(
    tx: Session,
    site: Site,
    caller: Caller,
    step_id: str,
    proof: LeaseProof,
    said: Completion,
    sealed: SealedLog,
    *,
    now: datetime,
) -> Verdict:
    """End a leased attempt. Said again, the same answer; an attempt that is not current changes nothing."""
    step = hold_attempt(tx, site, caller, step_id, proof)
    _require_sane(said)
    wanted = _target(said)
    if StepState(step.state).is_final:
        return _recorded(tx, step, wanted)
    if not StepState(step.state).is_leased and step.started_at is None:
        raise StaleAttempt(f"the step is {step.state}")
    if step.state == StepState.READY:
        revive_step(tx, caller, step, now=now)
        step = steps.get_step(tx, step.id)
    _require_whole_log(tx, step, said, sealed)
    if said.log_size is None and (said.log_gap or step.log_size):
        end_with_gap(tx, site, step, GAP if said.log_gap else UNENDED, now=now)
        step = steps.get_step(tx, step_id)
        said = said.model_copy(update={"log_gap": True})
    if said.status == "success":
        _require_within_limits(site, said)
        _require_outputs(tx, step, said)
    return _finish(tx, site, step, said, sealed, now=now)


def require_step(tx: Session, caller: Caller, step_id: str) -> None:
    """NotFound, unless there is such a step and the caller may see it."""
    get_visible_step(tx, caller, step_id)


def complete_bare_step(
    tx: Session, site: Site, caller: Caller, step_id: str, said: Completion, *, now: datetime
) -> Verdict:
    """The published contract's completion: a caller that knows the step's id and holds no lease."""
    step = steps.get_step(tx, step_id)
    _require_visible(tx, caller, step)
    build = builds.lock_build(tx, step.build_id)
    step = steps.get_step(tx, step_id)
    _require_sane(said)
    paths = _bare_paths(said.output_paths or [])
    state = StepState(step.state)
    if state.is_final:
        return _recorded(tx, step, _target(said))
    if build.state == BuildState.CREATED and not state.is_final:
        raise NotRunnable("the build has not been started")
    if state is StepState.PENDING:
        raise NotRunnable("the steps this one depends on have not succeeded")
    if step.runner_id is not None and state.is_leased:
        raise Leased("a runner holds this step")
    if state is StepState.READY:
        steps.claim_step(tx, step.id, now=now)
        step = steps.get_step(tx, step.id)
        attempts.insert_attempts(tx, [step], now=now)
        attempts.change_attempt(tx, step.id, step.attempt, started_at=now)
        close_log_before(tx, site, step, now=now)
        builds.begin_builds(tx, {step.build_id}, now=now)
    if paths:
        attempts.change_attempt(tx, step.id, step.attempt, output_paths=paths)
    if said.logs and step.log_size == 0:
        store_log(tx, site, step, said.logs.encode(), size=0, action=Action.CONTINUE, now=now)
        step = steps.get_step(tx, step.id)
    return _finish(tx, site, step, said.model_copy(update={"artifacts": []}), None, now=now)


def _require_visible(tx: Session, caller: Caller, step: Any) -> None:
    try:
        get_visible_build(tx, caller, step.build_id)
    except NotFound as error:
        raise type(error)("no such step") from error


def _require_sane(said: Completion) -> None:
    faults = []
    if said.status == "success" and said.exit_code not in (None, 0):
        faults.append(Fault("exitCode", "must be 0 when status is success"))
    if said.status == "success" and said.reason is not None:
        faults.append(Fault("reason", "must be absent when status is success"))
    below = _below_no_directory(said.artifacts)
    seen: set[str] = set()
    for index, entry in enumerate(said.artifacts):
        reason = (
            _entry_fault(entry)
            or ("names a path twice" if entry.path in seen else None)
            or (f"lies below {below[entry.path]!r}, no directory" if entry.path in below else None)
        )
        seen.add(entry.path)
        if reason:
            faults.append(Fault(f"artifacts[{index}].path", reason))
    if faults:
        raise Invalid("the completion is not valid", details=tuple(faults[:100]))


def _below_no_directory(entries: list[ArtifactEntry]) -> dict[str, str]:
    """The paths that no workspace can hold, each with the file or link that it would lie below."""
    below: dict[str, str] = {}
    above: str | None = None
    # in this order all that lies below a path comes right behind it
    for entry in sorted(entries, key=lambda entry: entry.path.replace("/", "\0")):
        if above is not None and entry.path.startswith(f"{above}/"):
            below[entry.path] = above
        elif entry.type != "directory":
            above = entry.path
    return below


def _entry_fault(entry: ArtifactEntry) -> str | None:
    parts = entry.path.split("/")
    if "" in parts or "." in parts or ".." in parts or any(ord(letter) < 32 for letter in entry.path):
        return "must be a relative, normalised path"
    try:
        refuse_unshowable("the path", entry.path)
    except InvalidReference as error:
        return str(error).removeprefix("the path ")
    if any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return f"must not hold a name of more than {MAX_NAME_BYTES} bytes"
    if entry.type == "file" and len(entry.sha256) != 64:
        return "needs the digest of its bytes"
    if entry.type == "link" and not _stays_inside(entry):
        return "must not point out of the workspace"
    return None


def _stays_inside(entry: ArtifactEntry) -> bool:
    if not entry.target or entry.target.startswith("/") or "\0" in entry.target:
        return False
    depth = entry.path.count("/")
    for part in entry.target.split("/"):
        if part == "..":
            depth -= 1
        elif part not in ("", "."):
            depth += 1
        if depth < 0:
            return False
    return True


def _bare_paths(paths: list[str]) -> list[str]:
    if len(paths) > MAX_BARE_PATHS:
        raise Invalid(
            "the completion is not valid",
            details=(Fault("outputPaths", f"must hold at most {MAX_BARE_PATHS} paths"),),
        )
    faults = []
    for index, path in enumerate(paths):
        try:
            output_pattern(path)
        except InvalidReference as error:
            faults.append(Fault(f"outputPaths[{index}]", str(error)))
    if faults:
        raise Invalid("the completion is not valid", details=tuple(faults))
    return list(dict.fromkeys(paths))


def _target(said: Completion) -> StepState:
    if said.status == "success":
        return StepState.SUCCEEDED
    return StepState.CANCELLED if said.reason is Reason.CANCELLED else StepState.FAILED


def _recorded(tx: Session, step: Any, wanted: StepState) -> Verdict:
    build = builds.get_build(tx, step.build_id)
    state = StepState(step.state)
    return Verdict(state is wanted, state, build.finished_at is not None)


def _require_whole_log(tx: Session, step: Any, said: Completion, sealed: SealedLog) -> None:
    has_all = step.log_size == said.log_size == sealed.size
    if said.log_size is None or (has_all and said.log_sha256 in (None, sealed.sha256)):
        return
    row = attempts.find_attempt(tx, step.id, step.attempt)
    if row is None or row.log_state != "truncated":
        raise LogIncomplete(0 if has_all else step.log_size)


def _require_within_limits(site: Site, said: Completion) -> None:
    settings = site.settings
    if len(said.artifacts) > settings.artifact_count:
        raise Invalid(f"a step may have {settings.artifact_count} outputs, not {len(said.artifacts)}")
    total = sum(entry.size for entry in said.artifacts)
    if total > settings.artifact_limit:
        raise Invalid(f"the outputs of a step may have {settings.artifact_limit} bytes, not {total}")


def _require_outputs(tx: Session, step: Any, said: Completion) -> None:
    missing = [
        pattern
        for pattern in step.spec["outputPaths"]
        if not is_pattern(pattern)
        and not any(entry.path == pattern or entry.path.startswith(pattern + "/") for entry in said.artifacts)
    ]
    if missing:
        raise OutputsIncomplete(
            f"the completion lacks {len(missing)} required outputs, such as {missing[0]!r}"
        )
    files = [entry for entry in said.artifacts if entry.type == "file"]
    sizes = artifacts.list_blob_sizes(tx, step.project_id, [entry.sha256 for entry in files])
    absent = [entry.path for entry in files if sizes.get(entry.sha256) != entry.size]
    if absent:
        raise OutputsIncomplete(f"{len(absent)} blobs have not arrived, such as that of {absent[0]!r}")


def _finish(
    tx: Session, site: Site, step: Any, said: Completion, sealed: SealedLog | None, *, now: datetime
) -> Verdict:
    reason = _reason(said)
    is_cancelled = step.cancel_requested_at is not None
    if is_cancelled:
        reason = Reason(step.cancel_reason or Reason.CANCELLED)
        event = event_of_stop(reason)
    elif said.status == "success":
        event = StepEvent.SUCCEED
    elif reason and (retry := next_retry(step, reason, exit_code=said.exit_code)):
        return _requeue(tx, site, step, said, reason, retry, sealed, now=now)
    elif reason is Reason.CANCELLED:
        event = StepEvent.CANCEL
    else:
        event = StepEvent.FAIL
    if step.state == StepState.CLAIMED and event is StepEvent.SUCCEED:
        steps.move_step(tx, step.id, StepEvent.START, attempt=step.attempt, started_at=step.started_at or now)
    moved = steps.move_step(
        tx, step.id, event, attempt=step.attempt, finished_at=now, reason=reason, exit_code=said.exit_code
    )
    if not moved:
        raise StaleAttempt("the step has moved on")
    state = _state_of(event)
    if event is StepEvent.SUCCEED:
        _insert_artifacts(tx, step, said.artifacts, now=now)
    _end_attempt(tx, step, said, state, reason, sealed, now=now)
    about = {"state": str(state), "reason": str(reason) if reason else None}
    audit.record_step(tx, _holder(step), "step.finished", step, now=now, **about)
    outcome = settle_build(tx, site, step.build_id, [step], reason=reason, now=now)
    return Verdict(is_same=state is _target(said), state=state, is_build_complete=outcome is not None)


def _reason(said: Completion) -> Reason | None:
    if said.status == "success":
        return None
    return said.reason or Reason.EXIT_NONZERO


def _state_of(event: StepEvent) -> StepState:
    return {
        StepEvent.SUCCEED: StepState.SUCCEEDED,
        StepEvent.FAIL: StepState.FAILED,
        StepEvent.CANCEL: StepState.CANCELLED,
    }[event]


def _requeue(
    tx: Session,
    site: Site,
    step: Any,
    said: Completion,
    reason: Reason,
    retry: Retry,
    sealed: SealedLog | None,
    *,
    now: datetime,
) -> Verdict:
    """The step will run again, on whichever runner comes first, unless it was told to stop meanwhile."""
    moved = steps.move_step(
        tx,
        step.id,
        StepEvent.REQUEUE,
        attempt=step.attempt,
        runner_id=None,
        request_id=None,
        infra_retries=retry.infra_retries,
        user_retries=retry.user_retries,
        not_before=now + retry.delay,
        reason=reason,
        started_at=None,
    )
    if not moved:
        return _finish_stopped(tx, site, step, said, sealed, now=now)
    _end_attempt(tx, step, said, StepState.FAILED, reason, sealed, now=now)
    audit.record_step(tx, _holder(step), "step.requeued", step, now=now, reason=str(reason))
    return Verdict(is_same=True, state=StepState.READY, is_build_complete=False)


def _finish_stopped(
    tx: Session, site: Site, step: Any, said: Completion, sealed: SealedLog | None, *, now: datetime
) -> Verdict:
    current = steps.get_step(tx, step.id)
    if current.cancel_requested_at is None:
        raise StaleAttempt("the step has moved on")
    return _finish(tx, site, current, said, sealed, now=now)


def _insert_artifacts(tx: Session, step: Any, entries: list[ArtifactEntry], *, now: datetime) -> None:
    artifacts.insert_artifacts(
        tx,
        [
            {
                "id": new_id(),
                "build_id": step.build_id,
                "step_id": step.id,
                "attempt": step.attempt,
                "created_at": now,
                **entry.model_dump(),
            }
            for entry in entries
        ],
    )


def _end_attempt(
    tx: Session,
    step: Any,
    said: Completion,
    state: StepState,
    reason: Reason | None,
    sealed: SealedLog | None,
    *,
    now: datetime,
) -> None:
    attempts.end_attempt(
        tx,
        step.id,
        step.attempt,
        outcome=state,
        reason=reason,
        detail=said.detail or None,
        exit_code=said.exit_code,
        oom=said.oom,
        finished_at=now,
        log_size=step.log_size,
        log_sha256=sealed.sha256 if sealed and sealed.size == step.log_size else None,
        has_gap=bool(said.log_gap),
    )


def _holder(step: Any) -> Caller:
    return Caller(actor=f"runner:{step.runner_id}" if step.runner_id else "client", audience=Audience.STEP)
