"""The limits a stored step was written with; one of an earlier version lacks some and gets the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from coordinator.rules.transitions import StepEvent
from shared.reasons import Reason
from shared.workflow import (
    DEFAULT_GRACE_S,
    DEFAULT_INFRASTRUCTURE_RETRIES,
    DEFAULT_PULL_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
)

Spec = Mapping[str, Any]


@dataclass(frozen=True)
class RetryLimits:
    """How often a step may run again by itself, and after which exit codes of its own."""

    infra: int = DEFAULT_INFRASTRUCTURE_RETRIES
    max: int = 0
    exit_codes: tuple[int, ...] = ()


def timeout_seconds(spec: Spec) -> int:
    return int(spec.get("timeoutSeconds", DEFAULT_TIMEOUT_S))


def grace_seconds(spec: Spec) -> int:
    """How long the step has between TERM and KILL."""
    return int(spec.get("graceSeconds", DEFAULT_GRACE_S))


def pull_timeout_seconds(spec: Spec) -> int:
    return int(spec.get("pullTimeoutSeconds", DEFAULT_PULL_TIMEOUT_S))


def retry_limits(spec: Spec) -> RetryLimits:
    said = spec.get("retry") or {}
    return RetryLimits(
        infra=int(said.get("infra", DEFAULT_INFRASTRUCTURE_RETRIES)),
        max=int(said.get("max", 0)),
        exit_codes=tuple(said.get("exitCodes", ())),
    )


STOPS_THAT_FAIL = frozenset({Reason.TIMEOUT, Reason.PULL_TIMEOUT})


def event_of_stop(reason: str | None) -> StepEvent:
    """How a told stop ends a step: it has failed when it was itself too slow, else it was cancelled."""
    return StepEvent.FAIL if reason in STOPS_THAT_FAIL else StepEvent.CANCEL


# beyond its limit and its grace a runner may take so long to say that a script has ended
RUN_PATIENCE = timedelta(seconds=60)
# a claim is given this for checkout, inputs and caches, beside the limit of its pull
PREPARATION_LIMIT = timedelta(hours=1)


def run_allowance(spec: Spec) -> timedelta:
    """After so long the coordinator itself ends a running step; its runner does so much earlier."""
    return timedelta(seconds=timeout_seconds(spec) + grace_seconds(spec)) + RUN_PATIENCE
