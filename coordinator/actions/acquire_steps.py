"""A runner takes ready steps."""

from datetime import datetime
from typing import Any

import structlog
from sqlmodel import Session

from coordinator.actions.end_unheard import end_unheard
from coordinator.actions.give_secrets import SecretsRefused
from coordinator.actions.render_claim import TooManyInputs, render_claim
from coordinator.actions.runner_session import require_session
from coordinator.actions.settle_build import settle_build
from coordinator.rules.access import SYSTEM, Caller
from coordinator.rules.transitions import StepEvent
from coordinator.site import Site
from coordinator.store import attempts, audit, builds, runners, steps
from shared.protocol import Acquire, Claim
from shared.reasons import Reason
from shared.states import StepState

log = structlog.get_logger()


def acquire_steps(tx: Session, site: Site, caller: Caller, said: Acquire, *, now: datetime) -> list[Claim]:
    """Claim up to `slots` steps. The same request gets the same answer, and never a second step."""
    runner = require_session(
        tx,
        caller,
        said.session,
        now=now,
        platform=said.platform,
        version=said.version,
        **({"draining": True} if said.draining else {}),
    )
    runners.lock_runner(tx, runner.id)
    repeated = steps.list_claims(tx, runner_id=runner.id, request_id=said.request_id)
    # a poll that was sent before the runner was told to stop may wait for long after its heartbeat says so
    is_draining = said.draining or runner.draining
    if not repeated and (
        is_draining or attempts.was_request_used(tx, runner_id=runner.id, request_id=said.request_id)
    ):
        return []
    claimed = repeated or _claim(tx, runner, said, now=now)
    if not claimed:
        return []
    found = builds.list_builds_by_id(tx, {step.build_id for step in claimed})
    claims = []
    for step in claimed:
        try:
            claims.append(render_claim(tx, site, step, found[step.build_id]))
        except TooManyInputs as error:
            _fail(tx, site, step, Reason.DISK_LIMIT, str(error), now=now)
        except SecretsRefused as error:
            _fail(tx, site, step, Reason.BAD_CONFIG, str(error), now=now)
        except (ValueError, TypeError, LookupError, AttributeError):
            # one step that cannot be handed out must not keep its runner from all others
            log.exception("claim_not_renderable", step=step.id)
            _fail(tx, site, step, Reason.BAD_CONFIG, None, now=now)
    return claims


def may_wait(tx: Session, caller: Caller, said: Acquire) -> bool:
    """False when no step will ever come of this request: it had its answer, or the runner is to end."""
    runner_id = caller.runner_id or ""
    runner = runners.find_runner(tx, runner_id)
    is_draining = said.draining or (runner is not None and runner.draining)
    return not is_draining and not attempts.was_request_used(
        tx, runner_id=runner_id, request_id=said.request_id
    )


def _claim(tx: Session, runner: Any, said: Acquire, *, now: datetime) -> list[Any]:
    labels = sorted(set(said.labels) & set(runner.labels))
    claimed = steps.claim_steps(
        tx,
        runner_id=runner.id,
        request_id=said.request_id,
        labels=labels,
        only_labelled=said.only_labelled,
        limit=said.slots,
        now=now,
        tenant_id=runner.tenant_id,
    )
    if claimed:
        attempts.insert_attempts(tx, claimed, now=now)
        builds.begin_builds(tx, {step.build_id for step in claimed}, now=now)
        happened = [(step, {"runnerId": runner.id}) for step in claimed]
        audit.record_each_step(tx, SYSTEM, "step.claimed", happened, now=now)
    return claimed


def _fail(tx: Session, site: Site, step: Any, reason: Reason, detail: str | None, *, now: datetime) -> None:
    builds.lock_build(tx, step.build_id)
    step = steps.get_step(tx, step.id)  # what is handed out again may have said something meanwhile
    failed = StepState.FAILED
    if not end_unheard(tx, site, step, StepEvent.FAIL, outcome=failed, reason=reason, detail=detail, now=now):
        return
    about = {"state": str(failed), "reason": str(reason)}
    audit.record_step(tx, SYSTEM, "step.finished", step, now=now, **about)
    settle_build(tx, site, step.build_id, [step], reason=reason, now=now)
