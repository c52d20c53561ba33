"""What every request can reach: the lanes, the site, the bell, the clock and the credentials of the start."""

from dataclasses import dataclass, field

from coordinator.api.poll_limit import PollLimit
from coordinator.bell import Bell
from coordinator.passwords import PasswordChecks
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


class Rights:
    """Counts how often somebody's rights have changed here, so that nobody goes on believing the old ones."""

    def __init__(self) -> None:
        self.version = 0

    def have_changed(self) -> None:
        self.version += 1


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
    rights: Rights = field(default_factory=Rights)
    has_walls: bool = False
    passwords: PasswordChecks = field(default_factory=PasswordChecks)
