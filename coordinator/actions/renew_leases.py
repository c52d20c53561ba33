"""A runner is alive, and holds these attempts."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.actions.give_secrets import give_secrets_again
from coordinator.actions.leased_step import LeaseProof, is_current
from coordinator.actions.revive_step import revive_step
from coordinator.actions.runner_session import get_own_runner, require_session
from coordinator.rules.access import Caller
from coordinator.rules.limits import grace_seconds
from coordinator.site import Site
from coordinator.store import attempts, deadlines, runners, steps
from shared.protocol import Action, AttemptReport, Heartbeat, Order, Orders, Phase, Resume
from shared.states import StepState


def renew_leases(tx: Session, site: Site, caller: Caller, said: Heartbeat, *, now: datetime) -> Orders:
    """Keep the attempts alive and say what to do with each."""
    runner = require_session(
        tx,
        caller,
        said.session,
        now=now,
        draining=said.draining,
        slots=said.slots,
        disk_free=said.disk_free,
        low_disk=said.low_disk,
        paused_until=now + timedelta(seconds=said.paused_for_s) if said.paused_for_s else None,
        pause_reason=said.pause_reason,
    )
    return _answer(tx, site, caller, runner, said.attempts, now=now)


def resume_attempts(tx: Session, site: Site, caller: Caller, said: Resume, *, now: datetime) -> Orders:
    """A restarted runner takes over from its former process and asks what still counts.

    It has forgotten the secrets of its attempts, and must have them again before it sends another line.
    """
    runner = get_own_runner(tx, caller)
    runners.change_runner(tx, runner.id, now=now, session=said.session, draining=False)
    orders = _answer(tx, site, caller, runner, said.attempts, now=now)
    return orders.model_copy(
        update={"attempts": [_with_secrets(tx, site, order) for order in orders.attempts]}
    )


def _with_secrets(tx: Session, site: Site, order: Order) -> Order:
    step = None if order.action is Action.ABANDON else steps.find_step(tx, order.step_id)
    if step is None or not step.spec.get("secrets"):
        return order
    return order.model_copy(update={"secrets": give_secrets_again(tx, site, step)})


def _answer(
    tx: Session,
    site: Site,
    caller: Caller,
    runner: Any,
    reports: Sequence[AttemptReport],
    *,
    now: datetime,
) -> Orders:
    step_ids = [report.step_id for report in reports]
    steps.lock_steps(tx, step_ids)
    named = steps.list_steps_by_id(tx, step_ids)
    found = {name: step for name, step in named.items() if runner.tenant_id in (None, step.tenant_id)}
    orders = [_order(tx, site, caller, found.get(report.step_id), report, now=now) for report in reports]
    alive = [order.step_id for order in orders if order.action is not Action.ABANDON]
    if alive:
        steps.touch_steps(tx, alive, caller.runner_id or "", now=now)
    _note_phases(tx, caller, found, [report for report in reports if report.step_id in alive])
    return Orders(
        attempts=orders,
        drain=False,
        next=site.settings.heartbeat,
        rotate=runner.rotate_requested_at is not None,
    )


def _note_phases(
    tx: Session, caller: Caller, found: Mapping[str, Any], reports: Sequence[AttemptReport]
) -> None:
    """Write down how far the runner is, where that has changed."""
    changed: dict[Phase, list[str]] = defaultdict(list)
    for report in reports:
        if found[report.step_id].phase != report.phase:
            changed[report.phase].append(report.step_id)
    for phase, step_ids in changed.items():
        deadlines.set_phase(tx, step_ids, caller.runner_id or "", phase)


def _order(
    tx: Session, site: Site, caller: Caller, step: Any, report: AttemptReport, *, now: datetime
) -> Order:
    def said(action: Action, reason: str = "") -> Order:
        grace = grace_seconds(step.spec if step is not None else {})
        return Order(
            step_id=report.step_id, attempt=report.attempt, action=action, reason=reason, grace_s=grace
        )

    if step is None:
        return said(Action.ABANDON, "unknown")
    if not is_current(site, caller, step, LeaseProof(report.attempt, report.lease)):
        return said(Action.ABANDON, "stale_attempt")
    if step.state == StepState.READY and revive_step(tx, caller, step, now=now):
        return said(Action.CONTINUE, "revived")
    if not StepState(step.state).is_leased:
        # an attempt that has ended may still have to hear the answer to its completion
        return (
            said(Action.CONTINUE, "ended") if _was_completed(tx, step) else said(Action.ABANDON, step.state)
        )
    if step.cancel_requested_at is not None:
        return said(Action.CANCEL, step.cancel_reason or "")
    return said(Action.CONTINUE)


def _was_completed(tx: Session, step: Any) -> bool:
    row = attempts.find_attempt(tx, step.id, step.attempt)
    return row is not None and row.outcome in (StepState.SUCCEEDED, StepState.FAILED)
