"""The limits a stored step was written with; one of an earlier version lacks some and gets the defaults."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from shared.workflow import DEFAULT_GRACE_S, DEFAULT_INFRASTRUCTURE_RETRIES, DEFAULT_TIMEOUT_S

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


def queue_limit(spec: Spec) -> timedelta | None:
    """How long the step may be ready without a runner; None without end."""
    said = spec.get("queueTimeoutSeconds")
    return None if said is None else timedelta(seconds=int(said))


def retry_limits(spec: Spec) -> RetryLimits:
    said = spec.get("retry") or {}
    return RetryLimits(
        infra=int(said.get("infra", DEFAULT_INFRASTRUCTURE_RETRIES)),
        max=int(said.get("max", 0)),
        exit_codes=tuple(said.get("exitCodes", ())),
    )
