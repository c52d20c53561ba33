"""One process at a time speaks for a runner: the one that came last."""

from datetime import datetime, timedelta
from typing import Any

from sqlmodel import Session

from coordinator.errors import Revoked, SessionSuperseded, Unauthenticated
from coordinator.rules.access import Caller
from coordinator.store import runners

_QUIET = timedelta(seconds=5)


def get_own_runner(tx: Session, caller: Caller) -> Any:
    """The row of the runner that speaks, unless it was revoked."""
    runner = runners.find_runner(tx, caller.runner_id or "")
    if runner is None:
        raise Unauthenticated("this runner is not known")
    if runner.revoked_at is not None:
        raise Revoked("this runner was revoked")
    return runner


def require_session(tx: Session, caller: Caller, session: str, *, now: datetime, **values: Any) -> Any:
    """The runner's row, if `session` is its current one; the first to speak becomes current."""
    runner = get_own_runner(tx, caller)
    if runner.session is not None and runner.session != session:
        raise SessionSuperseded("a newer process of this runner has taken over")
    changed = {name: value for name, value in values.items() if getattr(runner, name) != value}
    is_due = runner.last_seen_at is None or now - runner.last_seen_at > _QUIET
    if changed or is_due or runner.session is None:
        runners.change_runner(tx, runner.id, now=now, session=session, **changed)
    return runner
