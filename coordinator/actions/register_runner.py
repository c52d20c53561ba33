"""A machine becomes a runner."""

import hashlib
import secrets
from collections.abc import Sequence
from datetime import datetime

from sqlmodel import Session

from coordinator.errors import Denied, Invalid, Unauthenticated
from coordinator.rules.access import Caller
from coordinator.rules.enrolment import foreign_labels
from coordinator.store import audit, enrolments, runners
from coordinator.tables import Runner
from shared.faults import Fault
from shared.ids import new_id
from shared.protocol import Registered, Registration
from shared.references import InvalidReference, display_name, label

ENROLMENT_PREFIX = "bme_"


def secret_hash(secret: str) -> bytes:
    """What is stored of a secret of 256 random bits."""
    return hashlib.sha256(secret.encode()).digest()


def register_runner(tx: Session, caller: Caller, said: Registration, *, now: datetime) -> Registered:
    """Make the runner and show its secret, this once; it is what the token that lets it in says."""
    _require_valid(said)
    if caller.enrolment_token_id is not None:
        _use_token(tx, caller.enrolment_token_id, said.labels, now=now)
    secret = secrets.token_urlsafe(32)
    runner = Runner(
        id=new_id(),
        name=said.name,
        secret_hash=secret_hash(secret),
        tenant_id=caller.tenant_id if caller.enrolment_token_id is not None else None,
        enrolment_token_id=caller.enrolment_token_id,
        labels=sorted(set(said.labels)),
        platform=said.platform,
        version=said.version,
        created_at=now,
    )
    runners.insert_runner(tx, runner)
    audit.record(
        tx,
        caller,
        "runner.registered",
        now=now,
        tenant_id=runner.tenant_id,
        runnerId=runner.id,
        name=said.name,
        labels=runner.labels,
        enrolmentTokenId=runner.enrolment_token_id,
    )
    return Registered(runner_id=runner.id, runner_secret=secret)


def _use_token(tx: Session, token_id: str, labels: Sequence[str], *, now: datetime) -> None:
    """Count the use, in the transaction of the runner: there are never more runners than uses."""
    token = enrolments.find_token_by_id(tx, token_id)
    foreign = set(foreign_labels(token.labels if token is not None else (), labels))
    if foreign:
        faults = [
            Fault(f"labels[{index}]", "is not given by the enrolment token")
            for index, text in enumerate(labels)
            if text in foreign
        ]
        raise Denied(
            f"the enrolment token does not give the labels {', '.join(sorted(foreign))}",
            details=tuple(faults),
        )
    if not enrolments.use_token(tx, token_id, now=now):
        raise Unauthenticated("this enrolment token does not count any more")


def _require_valid(said: Registration) -> None:
    faults = []
    try:
        display_name(said.name)
    except InvalidReference as error:
        faults.append(Fault("name", str(error)))
    faults += label_faults(said.labels)
    if faults:
        raise Invalid("the runner is not valid", details=tuple(faults))


def label_faults(labels: Sequence[str]) -> list[Fault]:
    """What is wrong with each of these labels."""
    faults = []
    for index, text in enumerate(labels):
        try:
            label(text)
        except InvalidReference as error:
            faults.append(Fault(f"labels[{index}]", str(error)))
    return faults
