"""Writes down who was turned away, and never so often that a flood of such calls could fill the trail.

What is left out is counted, and the count follows in the next row, or in one of its own a second later.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlmodel import Session

from coordinator.api.state import AppState
from coordinator.errors import Denied
from coordinator.rules.access import Audience, Caller
from coordinator.store import audit

INTERVAL = timedelta(seconds=1)
MAX_ADDRESSES = 100
MAX_KNOWN = 1000
UNKNOWN = "unknown"
_OTHERS = Caller(actor=UNKNOWN, audience=Audience.ANYONE)

log = structlog.get_logger()


@dataclass
class _Account:
    """One who is turned away: when that was written down last, and what was not."""

    caller: Caller
    written_at: datetime
    omitted: int = 0
    waiting: dict[str, Any] | None = None

    def is_due(self, now: datetime) -> bool:
        return not timedelta() <= now - self.written_at < INTERVAL


class Denials:
    """At most one row a second for each caller at each address, and for so many of them at once."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._accounts: dict[tuple[str, str, str | None], _Account] = {}
        self._others = _Account(_OTHERS, state.clock())

    async def write_down(self, caller: Caller, method: str, path: str, status: int) -> None:
        """`path` is the template of the route: what a stranger typed does not get into the trail."""
        account = self._due(caller)
        if account is not None:
            await self._write([(account, {"method": method, "path": path, "status": status})])

    def note(self, caller: Caller, method: str | None, path: str | None, status: int) -> None:
        """The same a moment later, so that the caller's answer tells by no delay that it was written down.

        Neither method nor path for a request that was turned away before any route was looked for.
        """
        account = self._due(caller)
        if account is not None:
            account.waiting = {"method": method, "path": path, "status": status}

    async def write_omitted(self, *, everything: bool = False) -> None:
        """Write down what was noted, and what was left out when its second is over; or `everything`."""
        now = self._state.clock()
        rows: list[tuple[_Account, dict[str, Any]]] = []
        for account in self._accounts.values():
            if account.waiting is not None:
                rows.append((account, account.waiting))
                account.waiting = None
            elif account.omitted and (everything or account.is_due(now)):
                account.written_at = now
                rows.append((account, {}))
        if self._others.omitted:
            rows.append((self._others, {}))
        if rows:
            await self._write(rows)

    def _due(self, caller: Caller) -> _Account | None:
        """The account of who is to be written down now; None where it is counted only."""
        now = self._state.clock()
        key = (caller.address, caller.actor, caller.tenant_id)
        account = self._accounts.get(key)
        if account is None:
            if not self._has_room(caller, now):
                self._others.omitted += 1
                return None
            account = self._accounts[key] = _Account(caller, now)
            return account
        if not account.is_due(now):
            account.omitted += 1
            return None
        account.written_at = now
        return account

    def _has_room(self, caller: Caller, now: datetime) -> bool:
        """Strangers, who can be as many as they like, take no room from those who are known."""
        self._accounts = {
            key: account
            for key, account in self._accounts.items()
            if account.omitted or account.waiting is not None or not account.is_due(now)
        }
        is_stranger = caller.actor == UNKNOWN
        alike = sum((account.caller.actor == UNKNOWN) == is_stranger for account in self._accounts.values())
        return alike < (MAX_ADDRESSES if is_stranger else MAX_KNOWN)

    async def _write(self, rows: Sequence[tuple[_Account, dict[str, Any]]]) -> None:
        """One row for each; what cannot be written now is counted again."""
        now = self._state.clock()
        said = [(account.caller, {**about, "omitted": account.omitted or None}) for account, about in rows]
        counts = [account.omitted for account, _ in rows]
        for account, _ in rows:
            account.omitted = 0

        def write(tx: Session) -> None:
            for caller, details in said:
                audit.record(tx, caller, "access.denied", now=now, **details)

        try:
            await self._state.lanes.write(write)
        except Exception:
            # the refusal stands, and reads the same, whether or not it could be written down
            for (account, about), count in zip(rows, counts, strict=True):
                account.omitted += count + bool(about)
            log.exception("refusals were not written down", count=len(rows))


def turned_away(caller: Caller, error: Exception) -> Caller:
    """Who it was, also where that was known and nothing else was settled yet."""
    if isinstance(error, Denied) and error.actor:
        return replace(caller, actor=error.actor, tenant_id=error.tenant_id)
    return caller
