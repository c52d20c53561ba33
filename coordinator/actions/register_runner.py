"""A machine becomes a runner."""

import hashlib
import secrets
from datetime import datetime

from sqlmodel import Session

from coordinator.errors import Invalid
from coordinator.rules.access import Caller
from coordinator.store import audit, runners
from coordinator.tables import Runner
from shared.faults import Fault
from shared.ids import new_id
from shared.protocol import Registered, Registration
from shared.references import InvalidReference, display_name, label


def secret_hash(secret: str) -> bytes:
    """What is stored of a secret of 256 random bits."""
    return hashlib.sha256(secret.encode()).digest()


def register_runner(tx: Session, caller: Caller, said: Registration, *, now: datetime) -> Registered:
    """Make the runner and show its secret, this once."""
    _require_valid(said)
    secret = secrets.token_urlsafe(32)
    runner = Runner(
        id=new_id(),
        name=said.name,
        secret_hash=secret_hash(secret),
        labels=sorted(set(said.labels)),
        platform=said.platform,
        version=said.version,
        created_at=now,
    )
    runners.insert_runner(tx, runner)
    audit.record(tx, caller, "runner.registered", now=now, runnerId=runner.id, name=said.name)
    return Registered(runner_id=runner.id, runner_secret=secret)


def _require_valid(said: Registration) -> None:
    faults = []
    try:
        display_name(said.name)
    except InvalidReference as error:
        faults.append(Fault("name", str(error)))
    for index, text in enumerate(said.labels):
        try:
            label(text)
        except InvalidReference as error:
            faults.append(Fault(f"labels[{index}]", str(error)))
    if faults:
        raise Invalid("the runner is not valid", details=tuple(faults))
