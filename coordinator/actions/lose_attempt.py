"""The runner of an attempt is gone: the step goes to another one, or has failed."""

from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.end_unheard import LOST, close_unheard, end_unheard, write_unended
from coordinator.actions.settle_build import settle_build
from coordinator.rules.access import SYSTEM
from coordinator.rules.retries import Retry, next_retry
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import audit, builds, steps
from shared.reasons import Reason
from shared.states import StepState


def lose_attempt(tx: Session, site: Site, step: Any, *, now: datetime) -> int:
    """Ready again after a while, or failed where no retry is left; 0 when it was heard of meanwhile.

    `step` is the row as it was found. Runner and attempt stay named: if that runner comes back first, it goes
    on, and so does the log. What was told to stop is left to who forces stops.
    """
    builds.lock_build(tx, step.build_id)
    if steps.get_step(tx, step.id).last_seen_at != step.last_seen_at:
        return 0  # it was heard before its build was held, and its log may have grown
    return _give_up(tx, site, step.id, now=now, unheard_since=step.last_seen_at)


def take_attempt_away(tx: Session, site: Site, step: Any, *, now: datetime) -> int:
    """`lose_attempt` of a runner that must not come back, whatever is heard of it at this moment."""
    builds.lock_build(tx, step.build_id)
    return _give_up(tx, site, step.id, now=now, unheard_since=None, runner_id=None, request_id=None)


def _give_up(
    tx: Session, site: Site, step_id: str, *, now: datetime, unheard_since: datetime | None, **named: Any
) -> int:
    step = steps.get_step(tx, step_id)
    if step.cancel_requested_at is not None or not StepState(step.state).is_leased:
        return 0  # it was told to stop, or has ended, before its build was held
    retry = next_retry(step, Reason.RUNNER_LOST, exit_code=None)
    if retry is not None:
        event = "step.requeued"
        is_lost = _requeue(tx, site, step, retry, now=now, unheard_since=unheard_since, **named)
    else:
        event = "step.finished"
        is_lost = end_unheard(
            tx,
            site,
            step,
            StepEvent.FAIL,
            outcome=LOST,
            reason=Reason.RUNNER_LOST,
            now=now,
            unheard_since=unheard_since,
        )
    if not is_lost:
        return 0
    audit.record_step(tx, SYSTEM, event, step, now=now, reason=str(Reason.RUNNER_LOST))
    if retry is None:
        settle_build(tx, site, step.build_id, [step], reason=Reason.RUNNER_LOST, now=now)
    return 1


def _requeue(
    tx: Session,
    site: Site,
    step: Any,
    retry: Retry,
    *,
    now: datetime,
    unheard_since: datetime | None,
    **named: Any,
) -> bool:
    # who had begun may come back and go on with its log
    whole = write_unended(tx, site, step) if step.started_at is None else step.log_size
    moved = steps.move_step(
        tx,
        step.id,
        StepEvent.REQUEUE,
        attempt=step.attempt,
        unheard_since=unheard_since,
        infra_retries=retry.infra_retries,
        not_before=now + retry.delay,
        reason=Reason.RUNNER_LOST,
        log_size=whole,
        **named,
    )
    if moved:
        close_unheard(tx, step, whole, outcome=LOST, reason=Reason.RUNNER_LOST, now=now)
    return moved
