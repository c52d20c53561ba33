"""The one check that every write about a leased step begins with."""

import hmac
from dataclasses import dataclass
from typing import Any

from sqlmodel import Session

from coordinator.errors import Foreign, ForeignLease, StaleAttempt
from coordinator.rules.access import Caller
from coordinator.rules.leases import lease_token
from coordinator.site import Site
from coordinator.store import attempts, builds, runners, steps
from coordinator.store.lane_session import needs_locks
from shared.states import StepState


@dataclass(frozen=True)
class LeaseProof:
    """What a runner sends with each write: the attempt and its lease."""

    attempt: int
    lease: str


def get_attempt(tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof) -> Any:
    """The step, if this runner's attempt is its current one; it may have ended already."""
    step = steps.get_step(tx, step_id)
    if not is_current(site, caller, step, proof):
        get_own_attempt(tx, site, caller, step_id, proof)
        raise StaleAttempt(f"attempt {proof.attempt} of this step is not current")
    return step


def get_own_attempt(tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof) -> Any:
    """The attempt, current or not, if it was given to this runner under this lease; else ForeignLease.

    A runner of one tenant does not even hear whether there is such a step of another one.
    """
    row = attempts.find_attempt(tx, step_id, proof.attempt)
    if row is None or not _is_given_to(site, caller, row, proof, step_id=step_id):
        _require_step_of_its_tenant(tx, caller, step_id)
        raise ForeignLease(f"attempt {proof.attempt} of this step is not yours")
    return row


def _require_step_of_its_tenant(tx: Session, caller: Caller, step_id: str) -> None:
    runner = runners.find_runner(tx, caller.runner_id or "")
    tenant_id = runner.tenant_id if runner is not None else None
    if tenant_id is not None and steps.get_step(tx, step_id).tenant_id != tenant_id:
        raise Foreign("no such step")


def get_leased_step(tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof) -> Any:
    """The step, if this runner's attempt is current and still running; StaleAttempt otherwise."""
    return require_leased(get_attempt(tx, site, caller, step_id, proof))


def hold_attempt(tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof) -> Any:
    """`get_attempt`, and its build held: until the transaction ends nothing of it changes."""
    if needs_locks(tx):
        builds.lock_build_of(tx, step_id)
    return get_attempt(tx, site, caller, step_id, proof)


def hold_leased_step(tx: Session, site: Site, caller: Caller, step_id: str, proof: LeaseProof) -> Any:
    """`get_leased_step`, and its build held: until the transaction ends nothing of it changes."""
    return require_leased(hold_attempt(tx, site, caller, step_id, proof))


def is_current(site: Site, caller: Caller, step: Any, proof: LeaseProof) -> bool:
    """True when the runner, the attempt and the lease are those the step was last given to."""
    return step.attempt == proof.attempt and _is_given_to(site, caller, step, proof, step_id=step.id)


def _is_given_to(site: Site, caller: Caller, held: Any, proof: LeaseProof, *, step_id: str) -> bool:
    """`held`: a step or an attempt, as both name the runner and the request it was given to."""
    if caller.runner_id is None or held.runner_id != caller.runner_id:
        return False
    expected = lease_token(
        site.lease_key,
        step_id=step_id,
        attempt=held.attempt,
        runner_id=held.runner_id,
        request_id=held.request_id or "",
    )
    return hmac.compare_digest(expected.encode(), proof.lease.encode())


def require_leased(step: Any) -> Any:
    """The step itself, if some runner holds it; StaleAttempt otherwise."""
    if not StepState(step.state).is_leased:
        raise StaleAttempt(f"the step is {step.state}")
    return step
