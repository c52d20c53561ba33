"""What every request can reach: the lanes, the site, the bell, the clock and the credentials of the start."""

from dataclasses import dataclass, field

from coordinator.api.poll_limit import PollLimit
from coordinator.bell import Bell
from coordinator.settings import Settings
from coordinator.site import Site
from coordinator.store.lanes import Lanes
from coordinator.tally import Tally
from shared.clock import Clock


@dataclass(frozen=True)
class Credentials:
    """Made at the first start; shown to nobody but the files they lie in."""

    admin_token: str = field(repr=False)
    registration_token: str = field(repr=False)


@dataclass(frozen=True)
class AppState:
    """Made once by `create_app`."""

    settings: Settings
    lanes: Lanes
    site: Site
    bell: Bell
    clock: Clock
    credentials: Credentials
    specification: bytes = b"{}"
    tally: Tally = field(default_factory=Tally)
    polls: PollLimit = field(default_factory=PollLimit)
