"""Writes down who was turned away, and never so often that a flood of such calls could fill the trail."""

from datetime import datetime, timedelta
from typing import Any

import structlog

from coordinator.api.state import AppState
from coordinator.rules.access import Caller
from coordinator.store import audit

INTERVAL = timedelta(seconds=1)
MAX_ADDRESSES = 100

log = structlog.get_logger()


class Denials:
    """At most one row a second for each address, and for so many addresses at once."""

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._written: dict[str, datetime] = {}

    async def write_down(self, caller: Caller, method: str, path: str, status: int) -> None:
        """`path` is the template of the route: what a stranger typed does not get into the trail."""
        now = self._state.clock()
        if not self._is_due(caller.address, now):
            return
        about: dict[str, Any] = {"method": method, "path": path, "status": status}
        try:
            await self._state.lanes.write(
                lambda tx: audit.record(tx, caller, "access.denied", now=now, **about)
            )
        except Exception:
            # the refusal stands, and reads the same, whether or not it could be written down
            log.exception("a refusal was not written down", method=method, path=path, status=status)

    def _is_due(self, address: str, now: datetime) -> bool:
        self._written = {
            known: at for known, at in self._written.items() if timedelta() <= now - at < INTERVAL
        }
        if address in self._written or len(self._written) >= MAX_ADDRESSES:
            return False
        self._written[address] = now
        return True
