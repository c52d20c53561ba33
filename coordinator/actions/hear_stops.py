"""A runner that works wants to know at once when one of its steps is to stop."""

from sqlmodel import Session

from coordinator.actions.runner_session import get_own_runner
from coordinator.errors import SessionSuperseded
from coordinator.rules.access import Caller
from coordinator.store import stops
from shared.protocol import Listen, News


def hear_stops(tx: Session, caller: Caller, said: Listen) -> News | None:
    """None as long as there is nothing newer than what the runner has heard of."""
    runner = get_own_runner(tx, caller)
    if runner.session is not None and runner.session != said.session:
        raise SessionSuperseded("a newer process of this runner has taken over")
    latest = stops.latest_wish(tx, runner.id)
    if latest is None:
        return None
    since = latest.isoformat(timespec="microseconds")
    return News(since=since) if since > said.since else None
