"""How the whole stands at one moment: builds, steps and runners, for whoever watches from outside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlmodel import Session

from coordinator.store import audit_chain, measures
from shared.states import BuildState, StepState

MEASURED_STEPS = (StepState.READY, StepState.CLAIMED, StepState.RUNNING)
FORGOTTEN_AFTER = timedelta(days=1)


@dataclass(frozen=True)
class RunnerMeasure:
    """One runner that was heard within the last day."""

    id: str
    name: str
    is_online: bool
    is_draining: bool
    has_low_disk: bool
    paused_for_s: float
    free_slots: int
    disk_free: int


@dataclass(frozen=True)
class Measure:
    """Counts by state, and every runner."""

    builds: Mapping[str, int]
    steps: Mapping[str, int]
    oldest_ready_s: float
    runners: Sequence[RunnerMeasure]
    unsealed: int
    unsealed_for_s: float


def take_measure(tx: Session, *, now: datetime, lost_after: timedelta) -> Measure:
    """All that is read from the database for one look; it locks nothing."""
    oldest = measures.find_oldest_ready(tx, StepState.READY)
    unsealed, since = audit_chain.count_unsealed(tx)
    return Measure(
        builds={state: measures.count_builds(tx, state) for state in BuildState},
        steps={state: measures.count_steps(tx, state) for state in MEASURED_STEPS},
        oldest_ready_s=0.0 if oldest is None else max(0.0, (now - oldest).total_seconds()),
        runners=[
            RunnerMeasure(
                id=runner.id,
                name=runner.name,
                is_online=now - runner.last_seen_at <= lost_after,
                is_draining=runner.draining,
                has_low_disk=runner.low_disk,
                paused_for_s=_left_s(runner.paused_until, now),
                free_slots=runner.slots,
                disk_free=runner.disk_free,
            )
            for runner in measures.list_runners_seen(tx, now=now, within=FORGOTTEN_AFTER)
        ],
        unsealed=unsealed,
        unsealed_for_s=0.0 if since is None else max(0.0, (now - since).total_seconds()),
    )


def _left_s(until: datetime | None, now: datetime) -> float:
    return 0.0 if until is None else max(0.0, (until - now).total_seconds())
