"""A step that was told to stop, and whose runner does not confirm it, ends without its runner."""

from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.actions.end_unheard import end_unheard
from coordinator.actions.settle_build import settle_build
from coordinator.rules.access import SYSTEM
from coordinator.rules.limits import event_of_stop
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import audit, builds, steps, stops
from shared.states import StepState

BATCH = 100
FORCED = "forced"  # of an attempt that has failed, and whose runner never said so
UNREACHABLE_AFTER = timedelta(seconds=20)


def force_stops(tx: Session, site: Site, *, now: datetime, since: datetime | None = None) -> int:
    """End the steps of silent runners at once, of others when the grace and a minute are over."""
    silent_since = now - UNREACHABLE_AFTER
    can_tell = silent_since >= (since or site.started_at)  # who was not listened to was not silent
    moved = 0
    unstopped = stops.list_unstopped(
        tx, now=now, silent_since=silent_since if can_tell else None, limit=BATCH
    )
    for step in sorted(unstopped, key=steps.by_build):
        moved += _force(tx, site, step, now=now)
    return moved


def _force(tx: Session, site: Site, step: Any, *, now: datetime) -> int:
    builds.lock_build(tx, step.build_id)
    event = event_of_stop(step.cancel_reason)
    reason = step.cancel_reason
    step = steps.get_step(tx, step.id)  # its log may have grown before the build was held
    if not StepState(step.state).is_leased:
        return 0
    state = StepState.FAILED if event is StepEvent.FAIL else StepState.CANCELLED
    has_ended = end_unheard(
        tx,
        site,
        step,
        event,
        outcome=state if state is StepState.CANCELLED else FORCED,
        reason=reason,
        now=now,
    )
    if not has_ended:
        return 0
    audit.record_step(tx, SYSTEM, "step.finished", step, now=now, state=str(state), reason=reason)
    settle_build(tx, site, step.build_id, [step], reason=reason, now=now)
    return 1
