"""The coordinator's watch: looks each second at what has run out, and knows since when it has looked."""

from datetime import timedelta
from functools import partial

import structlog

from coordinator.actions.end_queueing import end_queueing
from coordinator.actions.end_stopped_builds import end_stopped_builds
from coordinator.actions.expire_leases import expire_leases
from coordinator.actions.force_stops import force_stops
from coordinator.actions.stop_overdue_builds import stop_overdue_builds
from coordinator.actions.stop_overrun import stop_overrun
from coordinator.api.state import AppState
from coordinator.errors import CoordinatorError

log = structlog.get_logger()

AWAY = timedelta(seconds=15)
LOOKS = (
    stop_overdue_builds,
    stop_overrun,
    force_stops,
    expire_leases,
    end_queueing,
    end_stopped_builds,
)


class Watch:
    """A coordinator that did not look for a while was itself away: stopped, or on a machine that slept.

    Then it begins anew, as after a start: nobody it could not hear counts as silent.
    """

    def __init__(self, state: AppState) -> None:
        self._state = state
        self._since = state.site.started_at
        self._looked_at = state.clock()

    async def look(self) -> int:
        """Act on everything that has run out; returns how many steps and builds it was."""
        now = self._state.clock()
        if now - self._looked_at > AWAY:
            log.warning("coordinator_was_away", seconds=(now - self._looked_at).total_seconds())
            self._since = now
        self._looked_at = now
        moved = 0
        for action in LOOKS:
            try:
                moved += await self._state.lanes.write(
                    partial(action, site=self._state.site, now=now, since=self._since)
                )
            except (CoordinatorError, OSError) as error:
                log.warning("look_failed", at=action.__name__, cause=str(error))  # the others go on
            except Exception:  # whatever it is: what the other looks are for must not wait for it
                log.exception("look_failed", at=action.__name__)
        return moved
