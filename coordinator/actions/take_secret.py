"""A runner that was asked to takes a new secret, of its own making: only the digest is ever told."""

from datetime import datetime

from sqlmodel import Session

from coordinator.actions.runner_session import get_own_runner
from coordinator.errors import Conflict, Invalid
from coordinator.rules.access import Caller
from coordinator.store import audit, runners
from shared.faults import Fault


def take_secret(tx: Session, caller: Caller, secret_sha256: str, *, now: datetime) -> None:
    """Let the secret of this digest count. Saying so again changes nothing.

    The present one counts until the new one is used: an answer that is lost locks nobody out.
    """
    digest = bytes.fromhex(secret_sha256)
    runners.lock_runner(tx, caller.runner_id or "")
    runner = get_own_runner(tx, caller)
    if digest == runner.secret_hash and runner.former_secret_hash is not None:
        return
    if runners.find_runner_by_secret(tx, digest) is not None:
        raise Invalid(
            "the secret is not new", details=(Fault("secretSha256", "must be of a secret nobody has had"),)
        )
    if not runners.begin_rotation(tx, runner.id, digest):
        raise Conflict("no new secret was asked for")


def use_secret(tx: Session, caller: Caller, secret_hash: bytes, *, now: datetime) -> None:
    """A request came with the new secret, so its runner has it for good: the former one ends."""
    runner_id = caller.runner_id or ""
    if runners.end_rotation(tx, runner_id, secret_hash):
        runner = get_own_runner(tx, caller)
        audit.record(
            tx,
            caller,
            "runner.rotated",
            now=now,
            tenant_id=runner.tenant_id,
            runnerId=runner_id,
            name=runner.name,
        )
