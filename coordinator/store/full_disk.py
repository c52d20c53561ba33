"""What a disk without room says, in our words: the same request may be sent again when there is some."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.errors import Unavailable

_SAYINGS = {
    errno.ENOSPC: "the coordinator's disk is full",
    errno.EDQUOT: "the coordinator's disk is full",
    errno.EIO: "the coordinator's disk fails",
}


@contextmanager
def disk_may_be_full() -> Iterator[None]:
    """Unavailable instead of the error of a disk that cannot take, or give, the bytes now."""
    try:
        yield
    except OSError as error:
        if error.errno not in _SAYINGS:
            raise
        raise Unavailable(_SAYINGS[error.errno]) from error
