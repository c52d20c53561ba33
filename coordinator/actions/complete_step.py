"""Record how a step ended and let its build move on."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.append_log import GAP, end_with_gap, store_log
from coordinator.actions.check_completion import SealedLog, check_completion
from coordinator.actions.end_unheard import UNENDED, close_log_before
from coordinator.actions.leased_step import LeaseProof, get_attempt, hold_attempt
from coordinator.actions.revive_step import revive_step
from coordinator.actions.settle_build import settle_build
from coordinator.actions.show_build import get_visible_build, get_visible_step
from coordinator.errors import (
    CoordinatorError,
    Leased,
    NotFound,
    NotRunnable,
    StaleAttempt,
)
from coordinator.rules.access import Audience, Caller
from coordinator.rules.completions import bare_paths, require_sane
from coordinator.rules.limits import event_of_stop
from coordinator.rules.retries import Retry, next_retry
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import artifacts, attempts, audit, builds, steps
from shared.ids import new_id
from shared.protocol import Action, ArtifactEntry, Completion
from shared.reasons import Reason
from shared.states import BuildState, StepState


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
    require_sane(said)
    wanted = _target(said)
    if StepState(step.state).is_final:
        return _recorded(tx, step, wanted)
    if not StepState(step.state).is_leased and step.started_at is None:
        raise StaleAttempt(f"the step is {step.state}")
    if step.state == StepState.READY:
        revive_step(tx, caller, step, now=now)
        step = steps.get_step(tx, step.id)
    check_completion(tx, site, step, said, sealed)
    if said.log_size is None and (said.log_gap or step.log_size):
        end_with_gap(tx, site, step, GAP if said.log_gap else UNENDED, now=now)
        step = steps.get_step(tx, step_id)
        said = said.model_copy(update={"log_gap": True})
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
    require_sane(said)
    paths = bare_paths(said.output_paths or [])
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


def _target(said: Completion) -> StepState:
    if said.status == "success":
        return StepState.SUCCEEDED
    return StepState.CANCELLED if said.reason is Reason.CANCELLED else StepState.FAILED


def _recorded(tx: Session, step: Any, wanted: StepState) -> Verdict:
    build = builds.get_build(tx, step.build_id)
    state = StepState(step.state)
    return Verdict(state is wanted, state, build.finished_at is not None)


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
    _record_ends(tx, _holder(step), event, [(step, said, sealed)], reason=reason, now=now)
    outcome = settle_build(tx, site, step.build_id, [step], reason=reason, now=now)
    state = _state_of(event)
    return Verdict(is_same=state is _target(said), state=state, is_build_complete=outcome is not None)


def is_plain_completion(tx: Session, site: Site, step: Any, said: Completion, sealed: SealedLog) -> bool:
    """True for a running step that has done what it should, and of which all has arrived that is told."""
    is_running = step.state == StepState.RUNNING and step.cancel_requested_at is None
    if not is_running or said.status != "success" or said.log_size is None or said.log_gap:
        return False
    try:
        require_sane(said)
        check_completion(tx, site, step, said, sealed)
    except CoordinatorError:
        return False
    return True


def complete_plainly(
    tx: Session, site: Site, completions: Sequence[tuple[Any, Completion, SealedLog]], *, now: datetime
) -> list[Verdict]:
    """`complete_step` for several of one runner that are plain and whose builds are held."""
    holder = _holder(completions[0][0])
    _record_ends(tx, holder, StepEvent.SUCCEED, completions, reason=None, now=now)
    of_build: dict[str, list[Any]] = {}
    for step, _, _ in completions:
        of_build.setdefault(step.build_id, []).append(step)
    outcomes = {
        build_id: settle_build(tx, site, build_id, ended, reason=None, now=now)
        for build_id, ended in sorted(of_build.items())
    }
    return [
        Verdict(True, StepState.SUCCEEDED, outcomes[step.build_id] is not None) for step, _, _ in completions
    ]


def _record_ends(
    tx: Session,
    holder: Caller,
    event: StepEvent,
    ends: Sequence[tuple[Any, Completion, SealedLog | None]],
    *,
    reason: Reason | None,
    now: datetime,
) -> None:
    """These steps end now, all in the same way; StaleAttempt when one of them has moved on."""
    moves = [
        (step, {"finished_at": now, "reason": reason, "exit_code": said.exit_code}) for step, said, _ in ends
    ]
    if not steps.move_each(tx, event, moves):
        raise StaleAttempt("the step has moved on")
    state = _state_of(event)
    if event is StepEvent.SUCCEED:
        _insert_artifacts(tx, [(step, said.artifacts) for step, said, _ in ends], now=now)
    _end_attempts(tx, ends, state, reason, now=now)
    about = {"state": str(state), "reason": str(reason) if reason else None}
    audit.record_each_step(tx, holder, "step.finished", [(step, about) for step, _, _ in ends], now=now)


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
    _end_attempts(tx, [(step, said, sealed)], StepState.FAILED, reason, now=now)
    audit.record_step(tx, _holder(step), "step.requeued", step, now=now, reason=str(reason))
    return Verdict(is_same=True, state=StepState.READY, is_build_complete=False)


def _finish_stopped(
    tx: Session, site: Site, step: Any, said: Completion, sealed: SealedLog | None, *, now: datetime
) -> Verdict:
    current = steps.get_step(tx, step.id)
    if current.cancel_requested_at is None:
        raise StaleAttempt("the step has moved on")
    return _finish(tx, site, current, said, sealed, now=now)


def _insert_artifacts(
    tx: Session, handed_on: Sequence[tuple[Any, Sequence[ArtifactEntry]]], *, now: datetime
) -> None:
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
            for step, entries in handed_on
            for entry in entries
        ],
    )


def _end_attempts(
    tx: Session,
    ends: Sequence[tuple[Any, Completion, SealedLog | None]],
    state: StepState,
    reason: Reason | None,
    *,
    now: datetime,
) -> None:
    """The attempts of these steps are over; those whose log has a gap never come with others."""
    told = [
        (
            step,
            {
                "outcome": state,
                "reason": reason,
                "detail": said.detail or None,
                "exit_code": said.exit_code,
                "oom": said.oom,
                "finished_at": now,
                "log_size": step.log_size,
                "log_sha256": sealed.sha256 if sealed and sealed.size == step.log_size else None,
            },
        )
        for step, said, sealed in ends
    ]
    attempts.end_each(tx, told, has_gap=any(said.log_gap for _, said, _ in ends))


def _holder(step: Any) -> Caller:
    return Caller(actor=f"runner:{step.runner_id}" if step.runner_id else "client", audience=Audience.STEP)
