"""Closes the audit trail behind what happens: gives rows their places, and writes down where the chains end.

Nothing waits for it, and it holds nobody up: rows are sealed after their own transactions, a few at a time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from coordinator.actions.list_chain_ends import list_chain_ends
from coordinator.actions.seal_trail import Sealed, seal_trail
from coordinator.api.denials import Denials
from coordinator.api.state import AppState
from coordinator.errors import CoordinatorError
from coordinator.rules.audit_chain import Checkpoint, Link
from coordinator.store.audit_chain import has_unsealed
from coordinator.store.checkpoint_file import CheckpointFile, CheckpointsBusy

log = structlog.get_logger()

EVERY_S = 0.5
CHECKPOINT_EVERY_S = 60.0
FINISH_S = 5.0
ROWS_AT_ONCE = 100
BATCHES_AT_ONCE = 1000
CHAINS_AT_ONCE = 200
PAUSE_S = 0.005


class Sealer:
    """Knows how far this process has sealed, and how far that is written down."""

    def __init__(self, state: AppState, denials: Denials, checkpoints: CheckpointFile) -> None:
        self._state = state
        self._denials = denials
        self._file = checkpoints
        self._ends: dict[str, Link] = {}
        self._written: dict[str, Link] = {}
        self._checkpoint_at = 0.0

    async def begin(self) -> None:
        """Find out what is written down, and what of the chains is not because a process was killed."""
        self._written = await asyncio.to_thread(self._file.find_lately)
        self._ends, after = dict(self._written), ""
        found: dict[str, Link] = {}
        while more := await self._state.lanes.read(
            partial(list_chain_ends, after=after, limit=CHAINS_AT_ONCE)
        ):
            found |= more
            after = max(more)
        for chain in self._written.keys() | found.keys():
            self._compare(chain, found.get(chain, Link(0, b"")))
        self._ends = found

    async def look(self) -> None:
        """What is due now."""
        await self._denials.write_omitted()
        await self.seal()
        if time.monotonic() >= self._checkpoint_at or self._ends.keys() - self._written.keys():
            await self.checkpoint()
            self._checkpoint_at = time.monotonic() + CHECKPOINT_EVERY_S

    async def seal(self) -> int:
        """Seal what is committed; others write in between. Returns how many rows that were."""
        count = 0
        for _ in range(BATCHES_AT_ONCE):
            if not await self._state.lanes.read(has_unsealed):
                break
            sealed = await self._state.lanes.write(partial(seal_trail, limit=ROWS_AT_ONCE))
            if not sealed.rows:
                break  # another process is at it
            self._remember(sealed)
            count += sealed.rows
            await asyncio.sleep(PAUSE_S)
        return count

    async def checkpoint(self) -> None:
        """Write down the ends of the chains that have grown."""
        grown = {chain: end for chain, end in self._ends.items() if self._written.get(chain) != end}
        if grown:
            now = self._state.clock()
            marks = [Checkpoint(chain, end.seq, end.hash, now) for chain, end in sorted(grown.items())]
            await asyncio.to_thread(self._file.append, marks)
            self._written |= grown

    async def finish(self) -> None:
        """What is left when the coordinator stops."""
        async with asyncio.timeout(FINISH_S):
            await self._denials.write_omitted(everything=True)
            await self.seal()
            await self.checkpoint()

    def _remember(self, sealed: Sealed) -> None:
        for chain, end in sealed.ends.items():
            self._compare(chain, sealed.began[chain])
            self._ends[chain] = end

    def _compare(self, chain: str, found: Link) -> None:
        """A chain never gets shorter, and its end never becomes another."""
        known = self._ends.get(chain)
        if known is not None and (
            found.seq < known.seq or (found.seq == known.seq and found.hash != known.hash)
        ):
            log.error("audit_trail_was_changed", chain=chain, ended_at=known.seq, ends_at=found.seq)


async def seal_the_trail(sealer: Sealer) -> None:
    """Until cancelled, and then once more. What fails is told and tried again."""
    begun = False
    try:
        while True:
            if not begun:
                begun = await _try(sealer.begin)
            else:
                await _try(sealer.look)
                await asyncio.sleep(EVERY_S)
    finally:
        await _try(sealer.finish)


async def _try(do: Callable[[], Awaitable[None]]) -> bool:
    try:
        await do()
    except CheckpointsBusy:
        return False  # the other process is done in a moment
    except (CoordinatorError, OSError) as error:
        log.warning("audit_trail_not_sealed", cause=str(error))
    except Exception:  # the last line of defence: the trail stays open until the next start
        log.exception("audit_trail_not_sealed")
    else:
        return True
    return False
