"""When an attempt that failed is followed by another, and after how long."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from coordinator.rules.limits import retry_limits
from shared.reasons import Reason

LONGEST_DELAY = timedelta(minutes=5)


@dataclass(frozen=True)
class Retry:
    """Another attempt of a step: how often it has run again then, and how long it waits before."""

    infra_retries: int
    user_retries: int
    delay: timedelta


def next_retry(step: Any, reason: Reason, *, exit_code: int | None) -> Retry | None:
    """The retry that this failure calls for; None when the step has failed for good.

    What the infrastructure broke is tried again by itself; what the script did only where its step asks for
    it; an exclusive step never.
    """
    limits = retry_limits(step.spec)
    infra, user = step.infra_retries, step.user_retries
    if step.exclusive:
        return None
    if reason is Reason.RUNNER_SHUTDOWN and infra < limits.infra:
        return Retry(infra + 1, user, timedelta())  # nothing is broken, and another runner may be free
    if reason.is_infrastructure:
        return Retry(infra + 1, user, retry_delay(infra)) if infra < limits.infra else None
    if reason is not Reason.EXIT_NONZERO or user >= limits.max:
        return None
    if limits.exit_codes and exit_code not in limits.exit_codes:
        return None
    return Retry(infra, user + 1, retry_delay(user))


def retry_delay(retries: int) -> timedelta:
    """10 s, 20 s, 40 s ... and never more than 5 minutes."""
    return min(timedelta(seconds=10 * 2**retries), LONGEST_DELAY)
