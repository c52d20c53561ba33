"""What can keep a drill, or one fault of it, from telling anything.

DrillError > {Unusable, NotSeen, Refused, Skipped}
"""


class DrillError(Exception):
    """The drill cannot go on as it meant to."""


class Unusable(DrillError):
    """The coordinator, the engine or the image cannot be used at all: nothing was tried."""


class NotSeen(DrillError):
    """What should have happened was not seen in time."""


class Refused(DrillError):
    """The coordinator answered something else than it had to."""


class Skipped(DrillError):
    """This fault cannot be caused here, for the reason that the message says."""
