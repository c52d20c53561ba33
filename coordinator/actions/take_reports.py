"""What a runner has to tell of several of its attempts, recorded all at once where it is plain."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlmodel import Session

from coordinator.actions.check_completion import EMPTY_LOG, SealedLog
from coordinator.actions.complete_step import Verdict, complete_plainly, is_plain_completion
from coordinator.actions.leased_step import LeaseProof, is_current
from coordinator.actions.start_step import is_plain_start, start_plainly
from coordinator.rules.access import Caller
from coordinator.site import Site
from coordinator.store import builds, steps
from coordinator.store.lane_session import needs_locks
from shared.protocol import Completion, Start, StartAnswer


@dataclass(frozen=True)
class Told:
    """One attempt starts or is over; `sealed` is its log as it was found on the disk right before."""

    step_id: str
    proof: LeaseProof
    said: Start | Completion
    sealed: SealedLog = EMPTY_LOG


def take_reports(
    tx: Session, site: Site, caller: Caller, reports: Mapping[int, Told], *, now: datetime
) -> dict[int, StartAnswer | Verdict]:
    """What was plain, by its place. What is missing changed nothing and is to be told by itself.

    Plain is what nearly all are: the lease is current, and either a first attempt starts or one that runs has
    succeeded. Of several reports about one step the first may be plain.
    """
    step_ids = list({told.step_id for told in reports.values()})
    if needs_locks(tx):
        builds.lock_builds_of(tx, step_ids)
        steps.lock_steps(tx, step_ids)
    found = steps.list_steps_by_id(tx, step_ids)
    starts: dict[int, tuple[Any, Start]] = {}
    completions: dict[int, tuple[Any, Completion, SealedLog]] = {}
    for place, told in reports.items():
        step = found.pop(told.step_id, None)
        if step is None or not is_current(site, caller, step, told.proof):
            continue
        if isinstance(told.said, Start):
            if is_plain_start(step):
                starts[place] = (step, told.said)
        elif is_plain_completion(tx, site, step, told.said, told.sealed):
            completions[place] = (step, told.said, told.sealed)
    answers: dict[int, StartAnswer | Verdict] = {}
    if starts:
        answers |= zip(starts, start_plainly(tx, caller, list(starts.values()), now=now), strict=True)
    if completions:
        verdicts = complete_plainly(tx, site, list(completions.values()), now=now)
        answers |= zip(completions, verdicts, strict=True)
    return answers
