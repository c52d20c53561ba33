"""Writes down who was turned away, and never so often that a flood of such calls could fill the trail.

What is left out is counted, and the count follows in the next row, or in one of its own a second later.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import structlog
from sqlmodel import Session

from coordinator.api.state import AppState
from coordinator.errors import Denied, Foreign, ForeignLease
from coordinator.rules.access import Audience, Caller
from coordinator.store import audit
from coordinator.store.owners import find_owners

INTERVAL = timedelta(seconds=1)
MAX_ADDRESSES = 100
MAX_KNOWN = 1000
MAX_SUSPECTS = 1000
UNKNOWN = "unknown"
_OTHERS = Caller(actor=UNKNOWN, audience=Audience.ANYONE)

log = structlog.get_logger()


@dataclass
class _Account:
    """One who is turned away: when that was written down last, and what was not."""

    caller: Caller
    written_at: datetime
    is_new: bool = True
    omitted: int = 0
    waiting: dict[str, Any] | None = None

    def is_due(self, now: datetime) -> bool:
        return not timedelta() <= now - self.written_at < INTERVAL


@dataclass(frozen=True)
class _Suspect:
    """One who asked for something that is not there for them."""

    caller: Caller
    method: str
    path: str
    named: Collection[str]


class Denials:
    """At most one row a second for each caller at each address, and for so many of them at once."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._accounts: dict[tuple[str, str, str | None], _Account] = {}
        self._suspects: list[_Suspect] = []
        self._others = _Account(_OTHERS, state.clock())

    async def write_refusal(
        self, error: Exception, status: int, caller: Caller, method: str, path: str, named: Collection[str]
    ) -> None:
        """Of any refusal what belongs into the trail; `named` are the ids in the path of the request."""
        if status in (401, 403) or isinstance(error, ForeignLease):
            await self.write_down(_turned_away(caller, error), method, path, status)
        elif isinstance(error, Foreign):
            self.note(caller, method, path, status)
        elif status == 404 and caller.grants is not None:
            self.suspect(caller, method, path, named)

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

    def suspect(self, caller: Caller, method: str, path: str, named: Collection[str]) -> None:
        """The caller was told that there is no such thing. Whether it is another tenant's is looked up later.

        So neither the answer nor its delay differs, and it makes no difference which wall hid the thing.
        """
        if len(self._suspects) < MAX_SUSPECTS:
            self._suspects.append(_Suspect(caller, method, path, named))
        else:
            self._account_of(caller).omitted += 1

    async def write_omitted(self, *, everything: bool = False) -> None:
        """Write down what was noted, and what was left out when its second is over; or `everything`."""
        await self._look_into_suspects()
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

    async def _look_into_suspects(self) -> None:
        suspects = self._suspects[:]
        if not suspects:
            return
        named = set().union(*(suspect.named for suspect in suspects))
        owners = await self._state.lanes.read(partial(find_owners, ids=named))
        del self._suspects[: len(suspects)]
        for suspect in suspects:
            its_owners = {owners[one] for one in suspect.named if one in owners}
            if its_owners - set(suspect.caller.grants or ()):
                self.note(suspect.caller, suspect.method, suspect.path, 404)

    def _due(self, caller: Caller) -> _Account | None:
        """The account of who is to be written down now; None where it is counted only."""
        now = self._state.clock()
        account = self._account_of(caller)
        if account is self._others or not (account.is_new or account.is_due(now)):
            account.omitted += 1
            return None
        account.is_new, account.written_at = False, now
        return account

    def _account_of(self, caller: Caller) -> _Account:
        """That of the caller, or that of all others where there is no room for one more."""
        now = self._state.clock()
        key = (caller.address, caller.actor, caller.tenant_id)
        if key not in self._accounts:
            if not self._has_room(caller, now):
                return self._others
            self._accounts[key] = _Account(caller, now)
        return self._accounts[key]

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


def _turned_away(caller: Caller, error: Exception) -> Caller:
    """Who it was, also where that was known and nothing else was settled yet."""
    if isinstance(error, Denied) and error.actor:
        return replace(caller, actor=error.actor, tenant_id=error.tenant_id)
    return caller
